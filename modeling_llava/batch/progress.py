"""How far a batch is: one line that is written anew on a terminal, and a line each half minute elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Rows a second, errors, and the time left.

    Args:
        total: Rows with those that were done before; None if nobody knows.
        done: Rows that were done before.
        file: Where lines go.
    """

    def __init__(self, total: int | None, *, done: int = 0, file: TextIO | None = None) -> None:
        self.total = total
        self.earlier = done
        self.num_rows = self.num_errors = 0
        self.file = sys.stderr if file is None else file
        self.is_terminal = self.file.isatty()
        self.start = self._shown = time.monotonic()
        self._width = 0

    def add(self, *, is_error: bool) -> None:
        self.num_rows += 1
        self.num_errors += is_error
        now = time.monotonic()
        if now - self._shown >= (0.25 if self.is_terminal else 30):
            self._shown = now
            self._show(self.describe(), end="")

    def describe(self) -> str:
        """The state in one line."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.num_rows / seconds
        done = self.earlier + self.num_rows
        rows = f"{done:,} rows" if self.total is None else f"{done:,} of {self.total:,} rows"
        parts = [rows, f"{rate:.2f} rows/s", f"{self.num_errors:,} errors"]
        if self.total is not None and self.num_rows and done < self.total:
            parts.append(f"{format_seconds((self.total - done) / rate)} left")
        return ", ".join(parts)

    def finish(self, text: str) -> None:
        """A last line in place of the others."""
        self._show(text, end="\n")

    def _show(self, text: str, *, end: str) -> None:
        if self.is_terminal:
            # Blanks hide what a longer line left.
            print(f"\r{text:<{self._width}}", end=end, file=self.file, flush=True)
            self._width = len(text)
        else:
            print(text, file=self.file, flush=True)


def format_seconds(seconds: float) -> str:
    """A time as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
