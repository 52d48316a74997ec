"""Starts the process that compiles, and reads what it has left."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pallasite.pallas_kernels.compile.errors import CompileError, MissingCompilerError
from pallasite.pallas_kernels.compile.report import Mode, Report
from pallasite.pallas_kernels.target import Target, find_target


@dataclass(frozen=True, kw_only=True)
class Process:
    """How the process that compiles is run.

    Attributes:
        timeout_s: when it is ended.
        python: the interpreter, which may have other compilers installed than this one.
        keep: an empty folder for the compiler's dumps, made where it is missing; None to delete
            them.
    """

    timeout_s: int | float = 600
    python: str = sys.executable
    keep: Path | None = None


def compile_for(
    function: str,
    target: Target | str,
    options: Mapping[str, Any] | None = None,
    mode: Mode = "compile",
    *,
    process: Process = Process(),
) -> Report:
    """Compiles a case for a target, which need not be there, in a process of its own.

    `function` is "module:function" of what returns a `Case`. It is called with `target` and with
    `options`, which must be values that JSON can hold, under the import path of this process. With
    "analyze" the report has the regions of a TPU's kernels and the registers of a GPU's; with
    "lower" nothing is compiled, and a GPU's compiler need not be installed.

    Raises CompileError where the case cannot be made or compiled, or takes too long,
    MissingCompilerError where the compiler is not installed, and ValueError for a target or mode
    that there is not, and for a folder to keep dumps in that is not empty.
    """
    target = find_target(target) if isinstance(target, str) else target
    modes = [mode for mode in get_args(Mode) if mode != "analyze" or target.platform != "cpu"]
    if mode not in modes:
        raise ValueError(f"got the mode {mode!r} for {target.name}; known are {', '.join(modes)}")
    with ExitStack() as stack:
        if process.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory("pallasite-compile")))
        else:
            folder = _empty(process.keep.absolute())
        return _run(function, target, dict(options or {}), mode, process, folder)


def _empty(folder: Path) -> Path:
    """Makes a folder where it is missing; ValueError for one in which something lies.

    An earlier run's dumps would be taken for this one's, and whose they are is not known here.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            "got a folder for dumps that is a file or not empty; it must be empty or missing; name"
            " another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(
    function: str,
    target: Target,
    options: dict[str, Any],
    mode: Mode,
    process: Process,
    folder: Path,
) -> Report:
    dump, result = folder / "dump", folder / "result.json"
    dump.mkdir()
    job = {
        "function": function,
        "target": target.name,
        "options": options,
        "mode": mode,
        "dump": str(dump),
        "result": str(result),
    }
    environment = os.environ | _environment(target, mode, dump)
    try:
        done = subprocess.run(
            [process.python, "-m", "pallasite.pallas_kernels.compile.child"],
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=process.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"{function} for {target.name} took more than {process.timeout_s:g} s to compile"
        ) from error
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if not result.exists():
        raise CompileError(
            f"{function} for {target.name}: the process that compiles ended with"
            f" {done.returncode}:\n{useful_lines(done.stderr[-8000:])}"
        )
    told = json.loads(result.read_text())
    if "report" in told:
        return Report.from_json(told["report"])
    if told["error"] == MissingCompilerError.__name__:
        raise MissingCompilerError(told["message"])
    raise CompileError(
        f"{function} for {target.name}: {told['error']}: {useful_lines(told['message'])}"
    )


def _environment(target: Target, mode: Mode, dump: Path) -> dict[str, str]:
    installed = tuple({os.path.join(p, "") for p in (sys.prefix, sys.base_prefix)})
    paths = [os.path.abspath(p) for p in sys.path]
    # Another interpreter has packages of its own.
    own = [p for p in paths if not os.path.join(p, "").startswith(installed)]
    flags = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(own)}
    if target.platform == "tpu":
        # Processes that compile may run beside each other, and beside one that owns a TPU.
        flags |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        if mode == "analyze":
            flags["LIBTPU_INIT_ARGS"] = " ".join(
                (
                    os.environ.get("LIBTPU_INIT_ARGS", ""),
                    f"--xla_jf_dump_to={dump}",
                    "--xla_jf_dump_llo_text=true",
                    "--xla_jf_dump_llo_pass_label_regex=final.*",
                    "--xla_mosaic_enable_llo_source_annotations=true",
                )
            )
    if target.platform == "gpu":
        flags["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        if mode == "analyze":
            flags["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}"
    return flags


def useful_lines(text: str, num_lines: int = 12) -> str:
    """Returns the lines of a compiler's message that a reader can use.

    Long ones are whole instructions of a program, with what is the matter before or after them.
    """
    text = re.sub(r'"body":"[^"]*"', '"body":"..."', text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    kept = [x if len(x) <= 500 else f"{x[:200]} ... {x[-300:]}" for x in lines[:num_lines]]
    return "\n".join(kept)
