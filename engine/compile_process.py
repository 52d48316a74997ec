"""Compiles a deployment's programs in a process that ends with it, and leaves them in a file.

What a compiler leaves behind in a process is about a tenth of a gigabyte, which no allocator gives
back. Here it goes with the process, and the server holds what it serves with and no more.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jax

from pallasite.engine.config import EngineConfig, Limits
from pallasite.engine.deployment import Deployment, plan_deployment
from pallasite.engine.program_file import ProgramFile, jax_settings
from pallasite.engine.programs import Programs
from pallasite.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig
from pallasite.models.sharding import MeshShape

_CONFIGS: dict[str, type] = {
    config.__name__: config
    for config in (
        *(EngineConfig, Limits, MeshShape),
        *(ModelConfig, Llama3Rope, LinearRope, LongRope),
    )
}


def compile_apart(
    deployment: Deployment, file: ProgramFile, progress: Callable[[str], None]
) -> int | None:
    """Has a new process write `file`; returns its exit status, None where none could be started.

    What it says goes to `progress`, and its errors where this process's go. Whether the file is
    there is for the caller to see. The process ends when this one does, or `progress` raises.
    """
    # Other values, such as a device, mean nothing to another process; it will find a name of its
    # own for the file, and say so.
    plain = (str, int, float, bool, type(None))
    job = {
        "model": _plain(deployment.model.config),
        "config": _plain(replace(deployment.config, compile_cache=None)),
        "num_pages": deployment.cache_spec.num_pages,
        "settings": {name: v for name, v in jax_settings().items() if isinstance(v, plain)},
        "path": str(file.path),
    }
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    try:
        process = subprocess.Popen(
            [sys.executable or "python", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    except OSError:
        return None
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _tell(process.stdin.fileno(), json.dumps(job).encode() + b"\n")
            for line in process.stdout:
                progress(line.decode().rstrip("\n"))
        except BaseException:
            process.kill()
            raise
    return process.returncode


def _tell(pipe: int, message: bytes) -> None:
    try:
        while message:
            message = message[os.write(pipe, message) :]
    except BrokenPipeError:
        pass  # it ended early; its status tells


def main() -> None:
    """Does the job that stands on the standard input; exits with 1 where it cannot.

    The standard input's end is the other process's: nobody waits for the programs any more.
    """
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    settings = jax.config.values
    for name, value in job["settings"].items():
        if name in settings and settings[name] != value:
            jax.config.update(name, value)
    # XLA cannot write out a CPU program that it has read from JAX's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    # By those settings alone: it may have cut its CPU for the mesh of an earlier engine.
    deployment = plan_deployment(_made(job["model"]), _made(job["config"]), jax.devices())
    deployment = deployment.with_pages(job["num_pages"])
    path = Path(job["path"])
    file = ProgramFile(path.parent, deployment)
    if file.path != path:
        sys.exit("pallasite: the process that compiles has another JAX, code, settings or devices")
    try:
        file.check_folder()
        programs = Programs(deployment.program_spec())
        programs.compile(lambda line: print(line, flush=True))
        file.write(programs.serialized())
    except OSError as error:
        sys.exit(f"pallasite: compiled programs cannot be kept in {file.path.parent}: {error}")


def _plain(value: Any) -> Any:
    """Returns a config as JSON can hold it: dataclasses by name, tuples as lists."""
    if is_dataclass(value):
        parts = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, "fields": parts}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _made(value: Any) -> Any:
    """Makes a config of what `_plain` returned."""
    if isinstance(value, dict):
        parts = {name: _made(part) for name, part in value["fields"].items()}
        return _CONFIGS[value["type"]](**parts)
    return tuple(_made(item) for item in value) if isinstance(value, list) else value


def _end_with_input() -> None:
    # Not by sys.stdin: a thread that holds its lock would keep the interpreter from ending.
    while os.read(0, 1024):
        pass
    os._exit(1)
