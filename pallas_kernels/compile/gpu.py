"""What XLA must be told of a GPU that is not there, and what its compiler tells of kernels."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallasite.pallas_kernels.compile.errors import CompileError, MissingCompilerError
from pallasite.pallas_kernels.target import Target

_ENTRY = re.compile(r"\.visible \.entry (\w+)\(")
_TARGET = re.compile(r"^\.target (\w+)", re.M)
_LAUNCHED = re.compile(
    r": kCustomKernel .*\] (\w+) grid: .* threads: \[(\d+), (\d+), (\d+)\] +shared_memory: (\d+)"
)
_COMPILED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """What a GPU kernel takes.

    Attributes:
        registers: of each thread.
        spill_stores: bytes that each thread writes for want of registers.
        spill_loads: bytes that it reads back.
        shared_bytes: shared memory of a block.
        threads: of a block.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    threads: int


def target_config(target: Target) -> str:
    """Returns XLA's GpuTargetConfigProto of a chip, as text.

    What is not in `Target` holds for all GPUs of compute capability 9.0 and 10.0: CUDA C++
    Programming Guide, "Technical Specifications per Compute Capability".
    """
    major, _, minor = target.compute_capability.partition(".")
    shared = target.vmem_bytes or 0
    return f"""
platform_name: "CUDA"
device_description_str: "{target.device_kinds[-1]}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {target.multiprocessors}
  clock_rate_ghz: {(target.clock_hz or 0) / 1e9}
  l2_cache_size: {target.l2_bytes}
  device_memory_size: {target.hbm_bytes}
  memory_bandwidth: {int(target.hbm_bytes_per_s or 0)}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  shared_memory_per_block: 49152
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def abstract_mesh(target: Target, wanted: AbstractMesh | None = None) -> AbstractMesh:
    """Returns a mesh like `wanted`, or of one device, whose devices are the target's, if GPUs.

    Under it a program can be lowered for a GPU that is not there, without its compiler: from JAX
    0.11 on, kernels are lowered for the GPU of the mesh.
    """
    device = None
    if target.platform == "gpu" and target.device_kinds:
        device = AbstractDevice(
            device_kind=target.device_kinds[-1],
            num_cores=target.multiprocessors,
            platform=target.platform,
        )
    if wanted is None:
        return AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return AbstractMesh(
        wanted.axis_sizes, wanted.axis_names, wanted.axis_types, abstract_device=device
    )


def read_kernels(folder: Path, names: list[str]) -> list[tuple[str, str, GpuUse]]:
    """Returns name, PTX entry and use of each compiled kernel that has one of `names`.

    Calls that do the same share one. Raises MissingCompilerError without ptxas, CompileError where
    it fails.
    """
    launched = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        for entry, x, y, z, shared in _LAUNCHED.findall(path.read_text()):
            launched[entry] = int(x) * int(y) * int(z), int(shared)
    found = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        called = {entry: name for entry in _ENTRY.findall(text) if (name := _name(entry, names))}
        if not called:
            continue
        for entry, stores, loads, registers in _COMPILED.findall(_assemble(path, text)):
            if entry in called and entry in launched:
                threads, shared_bytes = launched[entry]
                use = GpuUse(
                    registers=int(registers),
                    spill_stores=int(stores),
                    spill_loads=int(loads),
                    shared_bytes=shared_bytes,
                    threads=threads,
                )
                found.append((called[entry], entry, use))
    return found


def _name(entry: str, names: list[str]) -> str | None:
    """Returns which of `names` XLA has made `entry` of."""
    for name in names:
        plain = re.escape(re.sub(r"\W", "_", name))
        if re.fullmatch(rf"{plain}(__\d+)?", entry):
            return name
    return None


def _assemble(path: Path, text: str) -> str:
    """Returns what ptxas says of a PTX file."""
    chip = _TARGET.search(text)
    command = [_ptxas(), "-v", "--gpu-name", chip[1] if chip else "", str(path), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"got an error from ptxas: {done.stderr}")
    return done.stdout + done.stderr


def _ptxas() -> str:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(path)
    raise MissingCompilerError("got no ptxas; install it with pip install 'pallasite[cuda]'")
