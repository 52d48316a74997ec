"""The process that compiles: it ends with ours, and its file has the name that we look for."""

import os
import subprocess
import sys

from pallasite.engine.compile_process import compile_apart
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.program_file import ProgramFile
from tests.engine.test_program_file import SMALL
from tests.tiny_checkpoints import TINY


def test_the_other_process_ends_with_this_one(engines, tmp_path):
    script = (
        "import os, signal, sys; from pallasite.engine import Engine, EngineConfig\n"
        "from pathlib import Path\n"
        f"config = EngineConfig(compile_cache=Path({str(tmp_path)!r}), num_pages=64)\n"
        "def die(line):\n"
        "    if 'compiled program' in line: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Engine.load({str(engines.checkpoint)!r}, config, die)"
    )
    # The output's end is when the last process that could write to it has ended.
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert ended.returncode == -9
    assert list(tmp_path.glob("*.programs")) == []


def test_the_name_is_the_same_in_another_process(tmp_path):
    deployment = plan_deployment(TINY, SMALL)
    file = ProgramFile(tmp_path, deployment)
    assert compile_apart(deployment, file, lambda line: None) == 0
    assert list(tmp_path.glob("*.programs")) == [file.path]


def test_a_second_engine_of_another_mesh_finds_its_programs_too(engines, tmp_path):
    script = (
        "from dataclasses import replace; from pathlib import Path\n"
        "from pallasite.engine import Engine, EngineConfig\n"
        "from pallasite.models.sharding import MeshShape\n"
        f"config = EngineConfig(compile_cache=Path({str(tmp_path)!r}), num_pages=8, max_requests=4,"
        " max_batch_tokens=32, max_context_len=64)\n"
        "for mesh in (MeshShape(data=2), MeshShape()):\n"
        f"    Engine.load({str(engines.checkpoint)!r}, replace(config, mesh=mesh), print).close()\n"
    )
    # Without the flag that cuts the CPU for all tests, the first engine's mesh does it.
    environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "compiling here" not in ended.stdout, (ended.stdout, ended.stderr)
    assert ended.stdout.count("compiled programs") == 2
    assert len(list(tmp_path.glob("*.programs"))) == 2
