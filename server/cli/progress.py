"""A progress bar: one line on a terminal, and nothing anywhere else."""

import sys
from types import TracebackType
from typing import Self, TextIO

WIDTH = 30


class Bar:
    """The line is redrawn in place, and gone afterwards."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out, self._shows = out, out.isatty()

    def draw(self, done: int, of: int, words: str = "") -> None:
        """So much is done, of so much."""
        full = WIDTH * done // max(1, of)
        self.say(f"[{'█' * full}{' ' * (WIDTH - full)}] {done}/{of} {words}")

    def say(self, words: str) -> None:
        """Words instead of a bar."""
        if self._shows:
            self._out.write(f"\r\x1b[2K{words}")
            self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.say("")
