"""The command `pallasite`, as a process starts it. What it can do is in `server/commands.py`."""

import gc
import importlib
import sys
from collections.abc import Sequence

_COMMANDS = "pallasite.server.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `pallasite ARGV...` (None: the process's own) and returns the exit status."""
    if _COMMANDS not in sys.modules:
        _import_all()
    status: int = importlib.import_module(_COMMANDS).main(argv)
    return status


def _import_all() -> None:
    """Imports what the commands need, without looking for garbage.

    What is imported makes a lot of objects that all stay: looking through them again and again took
    a sixth of the time.
    """
    gc.disable()
    try:
        importlib.import_module(_COMMANDS)
    finally:
        gc.enable()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
