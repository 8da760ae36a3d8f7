"""A table whose rows are replaced answer by answer without losing the cursor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from textual.widgets import DataTable


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    label: str
    width: int
    """0: takes what the others leave (one such column a table)."""
    right: bool = False
    """Figures stand right under a heading that does too."""


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    cells: tuple[Text | str, ...]


_LEAST_WIDTH = 18


class RowTable(DataTable[Text | str]):
    """Shows `show_rows()`; the cursor stays on its row (by key) wherever that row moves to."""

    COLUMNS: tuple[Column, ...] = ()
    ROW_HEIGHT = 1

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, cursor_type="row", cell_padding=1, cursor_foreground_priority="renderable")
        self._shown: tuple[Row, ...] = ()
        self._laid_out_for = 0

    @property
    def current_key(self) -> str | None:
        """Key of the row under the cursor."""
        return self._shown[self.cursor_row].key if 0 <= self.cursor_row < len(self._shown) else None

    def show_rows(self, rows: Sequence[Row]) -> None:
        self._lay_out()
        rows = tuple(rows)
        if [row.key for row in rows] == [row.key for row in self._shown]:
            for old, new in zip(self._shown, rows, strict=True):
                for column, before, cell in zip(self.COLUMNS, old.cells, new.cells, strict=True):
                    if before != cell:
                        self.update_cell(new.key, column.key, cell)
            self._shown = rows
            return
        self._replace(rows)

    def on_resize(self) -> None:
        if self._laid_out_for and self._laid_out_for != self.size.width:
            self._lay_out()
            self._replace(self._shown)

    def _replace(self, rows: tuple[Row, ...]) -> None:
        current, scroll_y = self.current_key, self.scroll_y
        self.clear()
        self._shown = rows
        for row in rows:
            self.add_row(*row.cells, key=row.key, height=self.ROW_HEIGHT)
        keys = [row.key for row in rows]
        if current in keys:
            self.move_cursor(row=keys.index(current), scroll=False)
            self.scroll_to(y=scroll_y, animate=False)

    def _lay_out(self) -> None:
        """Columns for the present width. Their widths cannot change once they stand, so they are made anew."""
        if self._laid_out_for == self.size.width:
            return
        self._laid_out_for = self.size.width
        fixed = sum(column.width for column in self.COLUMNS) + 2 * self.cell_padding * len(self.COLUMNS)
        rest = max(_LEAST_WIDTH, self.size.width - fixed - 2)
        shown, self._shown = self._shown, ()
        self.clear(columns=True)
        for column in self.COLUMNS:
            label = Text(column.label, justify="right" if column.right else "left")
            self.add_column(label, key=column.key, width=column.width or rest)
        self._replace(shown)
