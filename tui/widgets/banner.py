"""One line across the top that says what is wrong with what is shown: stale, or paused."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static


class Banner(Static):
    """Hidden while `text` is empty."""

    text: reactive[str] = reactive("")
    alarm: reactive[bool] = reactive(False)

    def watch_text(self, text: str) -> None:
        self.update(Content(text))
        self.display = bool(text)

    def watch_alarm(self, alarm: bool) -> None:
        self.set_class(alarm, "alarm")
