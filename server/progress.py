"""What the command line says while it works, on standard error, so that results stay alone."""

import sys
import time
from collections.abc import Callable


def progress_printer() -> Callable[[str], None]:
    """A progress function that prints each message with the seconds since now."""
    start = time.monotonic()

    def show(message: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {message}", file=sys.stderr, flush=True)

    return show
