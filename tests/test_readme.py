"""The README's examples run as they are shown, on the real model; its commands can be parsed."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pallasite.engine.config import EngineConfig
from pallasite.models.sharding import MeshShape
from pallasite.server.arguments import engine_config, parse

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    pallasite (.+)$", README.read_text(), re.MULTILINE)


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


def arguments(command):
    """What a shell makes of a command, but for the comment behind it."""
    return shlex.split(command, comments=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_command_line_takes(command):
    if "--help" in command:
        with pytest.raises(SystemExit) as caught:
            parse(arguments(command))
        assert caught.value.code == 0
        return
    args = parse(arguments(command))
    if hasattr(args, "compile_cache"):
        assert isinstance(engine_config(args), EngineConfig)


def test_the_commands_show_what_can_be_chosen_of_devices_forms_and_adapters():
    """Each field of the engine's that a new user may look for has a command that changes it."""
    configs = [
        engine_config(args)
        for args in (parse(arguments(c)) for c in COMMANDS if "--help" not in c)
        if hasattr(args, "compile_cache")
    ]
    assert MeshShape(data=2, model=2) in [config.mesh for config in configs]
    assert {pattern for config in configs for pattern, _ in config.quantize} >= {"mlp", "self_attn"}
    assert "int8" in [config.cache for config in configs]
    assert max(config.max_adapters for config in configs) > 0
    assert any(command.startswith("evaluate ") for command in COMMANDS)
    assert any("--adapter " in command for command in COMMANDS)
