"""Progress bars in a log: a few lines in place of all that a terminal would erase."""

import re
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 30.0  # of bars in a log, besides the first line of each bar
# Moves the cursor of a terminal one line up. tqdm writes it after a second bar, which stands below the first one.
_CURSOR_UP = "\x1b[A"


class BarsAsLines:
    """Passes text on to a stream that is no terminal, but of all bars together at most two lines a minute.

    The first line of each bar is always passed on, so that a log shows at which stage a command is. Our bars and those
    of libraries write "\\r", the bar, and at the end "\\n". A log keeps what a terminal erases: one run of `recover`
    would leave 93 kB of bars.
    """

    def __init__(self, stream: Any) -> None:
        """Pass text on to `stream`, a text file such as `sys.stderr`."""
        self._stream = stream
        self._last_line_at = time.monotonic()  # when a line of a bar was passed on
        self._in_bar = False  # whether the latest text was a bar
        # Names of bars, such as "layers done". The empty one is that of a bar without a name, which is not shown at
        # once.
        self._shown_names = {""}

    def write(self, text: str) -> int:
        """Pass `text` on to the stream, but if it is a bar, leave that to `_write_bar`, which leaves most of them out.

        A bar is one line that begins with "\\r". Blank text after it is left out, such as the line end when the bar is
        closed, because lines of `_write_bar` have their line end already. `self._in_bar` notes whether a bar was the
        last that came. Returns the length of `text`, as files do.
        """
        line = text.replace(_CURSOR_UP, "").strip()
        # A line end after the bar does not count: `line` has none.
        is_single_line = "\n" not in line
        is_bar = text.startswith("\r") and is_single_line
        is_blank_after_bar = self._in_bar and not line
        if is_bar:
            self._in_bar = True
            self._write_bar(line)
        elif not is_blank_after_bar:
            self._in_bar = False
            self._stream.write(text)
        return len(text)

    def _write_bar(self, line: str) -> None:
        """Write a line of a bar if it is the first line of this bar, or if the last line of any bar is old.

        Notes the name of the bar (`_shown_names`) and the time in `self`, if the line is written. An empty line erases
        a bar, and is not written.
        """
        description = re.split(r"[:|]", line)[0]
        # "3 of 30 layers done: ..." and "4 of 30 layers done: ..." are lines of one bar.
        name = re.sub(r"\d+", "", description)
        is_late = time.monotonic() - self._last_line_at > _SECONDS_BETWEEN_LINES
        is_new = name not in self._shown_names
        if line and (is_new or is_late):
            self._shown_names.add(name)
            self._last_line_at = time.monotonic()
            self._stream.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # flush, fileno, encoding, isatty: those of the stream
