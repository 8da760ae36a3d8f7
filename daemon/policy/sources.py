"""Which texts a policy is made of: built-in ones by name, files with the `policies.d` beside them, folders.

Owns the meaning of `--policy`, and telling whether anything of it has changed on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...policies.policy import Policy
from ..errors import PolicyError, PolicyProblem
from .layers import Text, policy_of

_BUILTIN_FOLDER = Path(__file__).resolve().parent.parent.parent / "policies" / "builtin"
BUILTINS = tuple(sorted(path.stem for path in _BUILTIN_FOLDER.glob("*.yaml")))
DEFAULT = "default"
LAYERS_FOLDER = "policies.d"
_ENDINGS = (".yaml", ".yml")

Stamp = tuple[tuple[str, int, int, int], ...]
"""Of each file: path, inode, size, time of its last change in ns. Equal where nothing has changed."""


class Sources:
    """What `--policy` names, in order, the last over the others."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        """Each a built-in policy's name, a file, or a folder of files. None: the default policy."""
        self.words = tuple(words) or (DEFAULT,)

    def files(self) -> tuple[Path, ...]:
        """In the order in which they are read: a file, then `policies.d/*.yaml` beside it, by name."""
        found: list[Path] = []
        for word in self.words:
            if word in BUILTINS:
                found.append(_BUILTIN_FOLDER / f"{word}.yaml")
            elif Path(word).is_dir():
                found += _documents(Path(word))
            else:
                path = Path(word)
                found += [path, *_documents(path.parent / LAYERS_FOLDER)]
        return tuple(found)

    def stamp(self) -> Stamp:
        """What is there now. What can not be looked at has no stamp, and one again once it can."""
        found = []
        for path in self.files():
            try:
                is_now = path.stat()
            except OSError:
                continue
            found.append((str(path), is_now.st_ino, is_now.st_size, is_now.st_mtime_ns))
        return tuple(found)

    def texts(self) -> tuple[Text, ...]:
        """Raises PolicyError: a file is not there or no text, or a folder is empty."""
        texts = tuple(_text(path) for path in self.files())
        if not texts:
            raise PolicyError(
                PolicyProblem(", ".join(self.words), f"no policy document there: give a file, or one of {_names()}")
            )
        return texts

    def load(self) -> Policy:
        """Raises PolicyError."""
        return policy_of(self.texts())


def builtin_text(name: str) -> str:
    """Raises PolicyError where there is none of that name."""
    if name not in BUILTINS:
        raise PolicyError(PolicyProblem(name, f"no built-in policy: {_names()}"))
    return (_BUILTIN_FOLDER / f"{name}.yaml").read_text()


def _documents(folder: Path) -> list[Path]:
    return sorted(path for ending in _ENDINGS for path in folder.glob(f"*{ending}"))


def _text(path: Path) -> Text:
    try:
        return Text(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        given = "" if path.suffix else f", or one of {_names()}"
        problem = f"{reason}: give a policy document, or none for the built-in one{given}"
        raise PolicyError(PolicyProblem(str(path), problem)) from error


def _names() -> str:
    return ", ".join(BUILTINS)
