"""Policy documents as text: files, layers, and the policy in force while it changes.

Owns: YAML with the place of each value, what one layer says over another, which files a policy is made of, and its
reloading. Must not: know a key of a document (policies/document does).

Seen from outside: `BUILTINS`, `PolicyError`, `PolicyKeeper`, `Sources`, `Text`, `builtin_text`, `dump`, `policy_of`.
"""

from __future__ import annotations

from ..errors import PolicyError
from .keeper import PolicyKeeper
from .layers import Text, dump, policy_of
from .sources import BUILTINS, Sources, builtin_text

__all__ = ["BUILTINS", "PolicyError", "PolicyKeeper", "Sources", "Text", "builtin_text", "dump", "policy_of"]
