"""Policy documents: a mapping of plain values, as YAML gives it, -> Policy, and back.

Owns the document's grammar (table.py: one table, read by the parser and by the JSON Schema) and the words for whatever
is wrong. All of a document's problems are said at once, each with its path. Must not: read files; lines and columns,
duplicate keys and layers are the daemon's business.

Seen from outside: `NAME`, `DocumentError`, `Problem`, `changes`, `json_schema`, `parse_bytes`, `parse_policy`, `place`,
`written`.
"""

from __future__ import annotations

from typing import Any

from ..policy import Policy
from .problems import DocumentError, Problem
from .problems import words as place
from .quantities import parse_bytes
from .shapes import Reading, schema
from .table import DOCUMENT, NAME
from .write import changes, written

__all__ = [
    "NAME",
    "DocumentError",
    "Problem",
    "changes",
    "json_schema",
    "parse_bytes",
    "parse_policy",
    "place",
    "written",
]


def parse_policy(document: object) -> Policy:
    """The policy that a whole document stands for. Raises DocumentError, never anything else."""
    reading = Reading()
    policy = reading.read(DOCUMENT, document)
    if reading.problems:
        raise DocumentError(*reading.problems)
    made: Policy = policy
    return made


def json_schema() -> dict[str, Any]:
    """Of a policy document, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Equipoise policy"}
    return head | schema(DOCUMENT)
