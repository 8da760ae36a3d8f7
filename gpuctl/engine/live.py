"""What is kept of a turn under way beside the scheduler's books: its sampler, its text so far, who is told.

Owns: how output tokens become the text a client sees. Must not: know of queues or KV. The same tokens always give the
same text, so another engine that is told the tokens can go on where this one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .compute.language_model import LanguageModel
from .compute.sampler import Sampler
from .compute.text import TextStream
from .schedule.sequence import Sink, TextDelta, Token, TokenLogprob, Turn, TurnRequest

Sampled = TokenLogprob | Token


def token_of(sampled: Sampled) -> Token:
    return sampled.token if isinstance(sampled, TokenLogprob) else sampled


@dataclass(slots=True)
class LiveTurn:
    request: TurnRequest
    turn: Turn
    sink: Sink
    sampler: Sampler
    stream: TextStream = field(init=False)
    output: bytearray = field(default_factory=bytearray)
    text: str = ""
    follow: Callable[[Sampled], None] | None = None
    """Told every token before the sink is: another engine's client waits for it."""

    def __post_init__(self) -> None:
        self.stream = TextStream(self.request.stop)

    def take(self, sampled: Sampled, model: LanguageModel) -> bool:
        """Send what the token makes certain of the text; whether the text ends with it."""
        token = token_of(sampled)
        if self.follow is not None:
            self.follow(sampled)
        self.output += model.piece(token, special=True)
        ends = model.ends_text(token) and not self.request.ignore_end_of_text
        text = "" if ends else self.stream.push(model.piece(token))
        self.text += text
        if text or isinstance(sampled, TokenLogprob):
            self.sink(TextDelta(text, (sampled,) if isinstance(sampled, TokenLogprob) and not ends else ()))
        return ends or self.stream.stopped

    def flush(self) -> None:
        """Send the rest of the text: the turn has ended."""
        rest = self.stream.flush()
        self.text += rest
        if rest:
            self.sink(TextDelta(rest))

    def catch_up(self, tokens: Sequence[Token], model: LanguageModel) -> None:
        """Bring the text to where it is after `tokens`, which the client has been sent already."""
        told, self.sink = self.sink, lambda event: None
        follow, self.follow = self.follow, None
        for token in tokens:
            self.take(token, model)
        self.sink, self.follow = told, follow
