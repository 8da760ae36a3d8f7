"""What somebody else wrote, before a person's terminal sees it."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with U+FFFD in place of every character that a terminal would act upon; line ends and tabs stay.

    A command line is whatever an agent's model wrote: an escape sequence in it could rename the window it is shown in.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
