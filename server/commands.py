"""What `pallasite` does: it runs one command, and makes a message and a status of what went wrong.

0: done. 1: the server or the engine could not do it. 2: a flag, file or request that cannot work.
130: interrupted.
"""

import os
import sys
from collections.abc import Sequence

from pallasite.engine.errors import ConfigError, ErrorCode, RequestError
from pallasite.server import (
    command_evaluate,
    command_model,
    command_quantize,
    command_serve,
    command_text,
)
from pallasite.server.arguments import parse

_COMMANDS = {
    "pull": command_model.pull,
    "info": command_model.info,
    "quantize": command_quantize.quantize,
    "serve": command_serve.serve,
    "demo": command_serve.demo,
    "generate": command_text.generate,
    "chat": command_text.chat,
    "score": command_text.score,
    "evaluate": command_evaluate.evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `pallasite ARGV...` (None: the process's own) and returns the exit status."""
    try:
        args = parse(argv)
        status = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _complain(str(error), 2)
    except RequestError as error:
        is_users = error.code in (ErrorCode.INVALID_ARGUMENT, ErrorCode.NOT_FOUND)
        message, field = str(error), f"{error.field}: " if error.field else ""
        # The engine's own messages begin with the field.
        is_named = message.startswith(field)
        return _complain(message if is_named else field + message, 2 if is_users else 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(message: str, status: int) -> int:
    print(f"pallasite: {message}", file=sys.stderr)
    return status
