"""Compiles a deployment's programs in a process that ends with it, and leaves them in a file.

What a compiler leaves behind in a process is about a tenth of a gigabyte, which no allocator gives
back. Here it goes with the process, and the server holds what it serves with and no more.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import Deployment, plan_deployment
from pallasite.engine.program_file import ProgramFile, jax_settings
from pallasite.engine.programs import Programs
from pallasite.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process is told.

    Attributes:
        settings: JAX's, which it takes over.
        path: of the file that is wanted.
    """

    model: ModelConfig
    config: EngineConfig
    num_pages: int
    settings: dict[str, Any]
    path: Path


def compile_apart(
    deployment: Deployment, file: ProgramFile, progress: Callable[[str], None]
) -> int | None:
    """Has a new process write `file`; returns its exit status, None where none could be started.

    What it says goes to `progress`, and its errors where this process's go. Whether the file is
    there is for the caller to see.
    """
    job = Job(
        model=deployment.cache_spec.model,
        config=deployment.config,
        num_pages=deployment.cache_spec.num_pages,
        settings=jax_settings(),
        path=file.path,
    )
    # -P: the folder that this process was started in is nobody's package.
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError:
        return None
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin:
                process.stdin.write(pickle.dumps(job))
            for line in process.stdout:
                progress(line.decode().rstrip("\n"))
        except BrokenPipeError:
            pass  # it ended early; its status tells
        except BaseException:
            process.kill()
            raise
    return process.returncode


def main() -> None:
    """Does the job that stands on the standard input; exits with 1 where it cannot."""
    job = pickle.loads(sys.stdin.buffer.read())
    assert isinstance(job, Job)
    for name, value in job.settings.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    # XLA cannot write out a CPU program that it has read from JAX's cache.
    jax.config.update("jax_enable_compilation_cache", False)
    deployment = plan_deployment(job.model, job.config).with_pages(job.num_pages)
    file = ProgramFile(job.path.parent, deployment)
    if file.path != job.path:
        sys.exit("pallasite: the process that compiles sees another JAX or other devices")
    programs = Programs(deployment.program_spec())
    programs.compile(lambda line: print(line, flush=True))
    file.write(programs.table)
