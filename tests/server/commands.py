"""The command line in processes of its own, as a user runs it."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

COMMAND = [sys.executable, "-m", "pallasite.server"]


def pallasite(*argv):
    """Runs a command to its end."""
    command = [*COMMAND, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def pallasite_alone(*argv):
    """Runs a command without the flags of XLA that the tests have."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [*COMMAND, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@contextmanager
def served(model, *flags):
    """Yields the address of `pallasite serve`, stopped as an operator would."""
    command = [*COMMAND, "serve", str(model), "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r" is served on (\S+)", line):
                break
        else:
            pytest.fail("".join(said))
        yield match[1]
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(30) == 0
