"""Prints to the terminal without ever breaking a run by it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

log = logging.getLogger("dynwatch")

# For a terminal or a file that takes no Unicode.
_PLAIN = str.maketrans({"▁": "_", "▂": ".", "▃": ",", "▄": "-", "▅": "=", "▆": "+", "▇": "*", "█": "#", "…": "..."})


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # Rich's own answer ends the process, and the run with it


@contextmanager
def terminal() -> Iterator[Console]:
    """A console to print on; what cannot be printed is told in the log, and the run goes on."""
    console = _Console()
    try:
        if _takes_unicode(console.encoding):
            yield console
        else:
            with console.capture() as drawn:
                yield console
            plain = drawn.get().translate(_PLAIN)
            sys.stdout.write(plain.encode(console.encoding, "replace").decode(console.encoding))
    except Exception as error:
        log.warning("dynwatch could not print to the terminal: %s: %s. The run goes on.", type(error).__name__, error)


def _takes_unicode(encoding: str) -> bool:
    try:
        "▁".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
