"""Policy documents on disk. Owns reading them; what they mean is policies/document.py's."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..policies.document import DocumentError, parse_policy
from ..policies.policy import Policy
from .errors import CommandError

BUILTIN = Path(__file__).resolve().parent.parent / "policies" / "builtin" / "default.yaml"


def load(path: Path) -> Policy:
    """Raises CommandError with file, place and remedy for anything that is not a policy."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(f"{path}: {reason}: give a policy document, or none for the built-in one") from error
    try:
        return parse_policy(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise CommandError(f"{path}{line}: not YAML: {problem}") from error
    except DocumentError as error:
        raise CommandError(f"{path}: {error}") from error
