"""What the tests of the command line share."""

from types import SimpleNamespace

import pytest

from pallasite.server.__main__ import main


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; returns its status, output and error output."""

    def run(*argv):
        status = main([str(argument) for argument in argv])
        output = capsys.readouterr()
        return SimpleNamespace(status=status, out=output.out, err=output.err)

    return run
