"""Turns output tokens into text: whole UTF-8 characters only, and nothing beyond a stop string.

Owns: the bytes of an unfinished character and the text held back because a stop string may be forming.
Must not: know of sampling or HTTP.
"""

from __future__ import annotations

import codecs


class TextStream:
    """The text of one turn. Feed it token pieces; what it returns is safe to send."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False
        """A stop string was met; the text before it is all there is."""

    def push(self, piece: bytes) -> str:
        """Text now certain to be output."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(piece)
        return self._release()

    def flush(self) -> str:
        """The rest: the turn has ended. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        text, self._held = self._release() + self._held, ""
        return text

    def _release(self) -> str:
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
