"""Finds how much of a new prompt a session has already been computed for.

Owns: the rule that maps a rendered prompt onto a session's tokens. Must not: change the session or the books.
The rule: where the prompt's text begins with the session's text, the session's own tokens stand (what was sampled need
not be how the tokenizer would split the same text) and only the rest is tokenized. The session's text ends at a turn's
end, where the template continues with a control token, so the cut never falls inside a word. Anything else is
tokenized afresh and compared token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule.sequence import Session, Token, common_prefix
from .language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[Token]
    common_tokens: int
    """Leading tokens equal to the session's."""


def map_prompt(model: LanguageModel, session: Session, text: str) -> Prompt:
    """The prompt's tokens and how many of them the session already has."""
    if session.tokens and session.text and text.startswith(session.text):
        rest = model.tokenize(text[len(session.text) :], first=False)
        return Prompt([*session.tokens, *rest], len(session.tokens))
    tokens = model.tokenize(text)
    return Prompt(tokens, common_prefix(session.tokens, tokens))


def joined(prompt: str, output: bytes | bytearray) -> str | None:
    """The conversation's text after a turn; None where the output is not clean UTF-8."""
    try:
        return prompt + output.decode("utf-8")
    except UnicodeDecodeError:
        return None
