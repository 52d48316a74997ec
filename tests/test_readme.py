"""The README's examples run as they are shown, on the real model."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def run_example(code):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_offline_example_is_five_lines_and_runs(real_model_path):
    code = EXAMPLES[0]
    assert len(code.splitlines()) == 5
    assert code.startswith("from pallasite.engine import Engine, EngineConfig, Request, Sampling")
    result = run_example(code)
    assert result.returncode == 0, result.stderr
    token_ids = tuple(map(int, result.stdout.strip("()\n").split(", ")))
    assert len(token_ids) == 8
    assert token_ids[0] == 7042  # " Paris"


def test_the_client_example_runs(real_model_path, compile_cache):
    command = [sys.executable, "-m", "pallasite.server", "serve", "smollm2-135m", "--port", "0"]
    command += ["--max-requests", "2", "--max-context-len", "256", "--compile-cache"]
    with subprocess.Popen(
        [*command, str(compile_cache)], stderr=subprocess.PIPE, text=True
    ) as server:
        said = ""
        for line in server.stderr:
            said += line
            if match := re.search(r"smollm2-135m is served on (\S+)", line):
                break
        else:
            pytest.fail(said)
        result = run_example(EXAMPLES[1].replace("127.0.0.1:9000", match[1]))
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 3
    assert server.returncode == 0
