"""The process that compiles: reads one job, leaves a report or an error in a file, and ends.

A compiler may abort, or leave its process with a tenth of a gigabyte that nothing gives back, and
its flags are read once, when it is loaded.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallasite.pallas_kernels.compile import gpu, hlo, names, traffic
from pallasite.pallas_kernels.compile.case import Case
from pallasite.pallas_kernels.compile.errors import CompileError, MissingCompilerError
from pallasite.pallas_kernels.compile.llo import has_dump, read_kernel
from pallasite.pallas_kernels.compile.report import Kernel, Memory, Report
from pallasite.pallas_kernels.target import Target, find_target

_PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}
_COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda13_plugin", "cuda")}
"""The module that is a platform's compiler, and the extra of pallasite that installs it."""

_COMPILER_PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"),
}
"""What decides a program beside JAX; the last of a GPU's has the assembler."""


def main() -> None:
    """Does the job that stands on the standard input."""
    job = json.load(sys.stdin)
    try:
        result = {"report": _compile(job).to_json()}
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits tells of it
        traceback.print_exc()
        result = {"error": type(error).__name__, "message": str(error)}
    Path(job["result"]).write_text(json.dumps(result))


def _compile(job: dict[str, Any]) -> Report:
    # A program out of the cache would leave no dumps.
    jax.config.update("jax_enable_compilation_cache", False)
    target, mode = find_target(job["target"]), job["mode"]
    needs_compiler = target.platform == "tpu" or mode != "lower"
    if needs_compiler and target.platform in _COMPILERS:
        module, extra = _COMPILERS[target.platform]
        if importlib.util.find_spec(module) is None:
            raise MissingCompilerError(
                f"got no compiler for {target.name} in {sys.executable}; install it with"
                f" pip install 'pallasite[{extra}]'"
            )
    case = _case(job, target)
    function = case.function
    if not hasattr(function, "trace"):
        function = jax.jit(function, donate_argnums=case.donated)
    elif case.donated:
        raise CompileError("got donated arguments beside a jitted function; have its jit donate")
    platforms = (_PLATFORMS[target.platform],)
    if needs_compiler:
        mesh = _mesh(target, case.mesh)
        arguments = _placed(case.arguments, mesh)
        # Kernels read off it what they are compiled for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = function.trace(*arguments)
            lowered = traced.lower(lowering_platforms=platforms)
    else:
        with jax.sharding.use_abstract_mesh(gpu.abstract_mesh(target, case.mesh)):
            traced = function.trace(*case.arguments)
            lowered = traced.lower(lowering_platforms=platforms)
    if mode == "lower":
        return _report(job, target, kernels=_called(traced.jaxpr))
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    text = compiled.as_text()
    kernels = _kernels(job, target, text, traced.jaxpr)
    report = _report(job, target, compile_s, _memory(compiled), hlo.copies(text), kernels)
    if target.platform != "tpu" or mode != "analyze":
        return report
    return replace(report, instructions=_instructions(job, target, text, kernels))


def _instructions(
    job: dict[str, Any], target: Target, text: str, kernels: tuple[Kernel, ...]
) -> tuple[traffic.Instruction, ...]:
    """Returns what a program runs, with the bundles of what has been compiled for itself."""
    dump = Path(job["dump"])
    roots = {kernel.instruction: kernel.root for kernel in kernels}
    found = []
    for instruction in traffic.instructions(text):
        root = roots.get(instruction.name)
        if root is None and has_dump(dump, instruction.name):
            root = read_kernel(dump, instruction.name, target.name, names.NO_NAMES)[0]
        try:
            bundles = root.weighted().bundles if root else None
        except ValueError:
            # A loop whose count is known only while running.
            bundles = None
        found.append(replace(instruction, bundles=bundles))
    return tuple(found)


def _kernels(job: dict[str, Any], target: Target, text: str, jaxpr: Any) -> tuple[Kernel, ...]:
    dump, is_analyzed = Path(job["dump"]), job["mode"] == "analyze"
    if target.platform == "gpu" and is_analyzed:
        found = gpu.read_kernels(dump, names.kernel_names(jaxpr))
        return tuple(Kernel(name=n, instruction=entry, gpu=use) for n, entry, use in found)
    if target.platform != "tpu":
        return _called(jaxpr)
    source = names.source_names(jaxpr)
    calls = hlo.tpu_calls(text)
    compiled = {}
    if is_analyzed:
        compiled = {c.code: c.instruction for c in calls if has_dump(dump, c.instruction)}
    kernels = []
    for call in calls:
        kernel = Kernel(name=call.name, instruction=call.instruction, vmem_bytes=call.vmem_bytes)
        if is_analyzed:
            instruction = compiled.get(call.code, call.instruction)
            root, capacity = read_kernel(dump, instruction, target.name, source)
            kernel = replace(kernel, root=replace(root, name=call.name), capacity=capacity)
        kernels.append(kernel)
    return tuple(kernels)


def _report(
    job: dict[str, Any],
    target: Target,
    compile_s: int | float = 0,
    memory: Memory | None = None,
    copies: tuple[hlo.Copy, ...] = (),
    kernels: tuple[Kernel, ...] = (),
) -> Report:
    return Report(
        function=job["function"],
        target=target.name,
        mode=job["mode"],
        compile_s=compile_s,
        memory=memory,
        copies=copies,
        kernels=kernels,
        versions=dict(_versions(target.platform)),
    )


def _versions(platform: str) -> Iterator[tuple[str, str]]:
    for name in ("jax", "jaxlib", *_COMPILER_PACKAGES.get(platform, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _case(job: dict[str, Any], target: Target) -> Case:
    module_name, _, name = job["function"].partition(":")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise CompileError(f"got no function {job['function']}: {error}") from error
    case = make(target=target, **job["options"])
    if not isinstance(case, Case):
        raise CompileError(f"got {type(case).__name__} from {job['function']}; it must be a Case")
    return case


def _mesh(target: Target, wanted: AbstractMesh | None) -> Mesh:
    names, sizes = (wanted.axis_names, wanted.axis_sizes) if wanted else (("x",), (1,))
    num_devices = int(np.prod(sizes))
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", num_devices)
        devices = jax.devices("cpu")
    elif not target.topology:
        raise CompileError(f"got {target.name}, which is no one chip; name one, such as gpu:h100")
    elif target.platform == "gpu":
        devices = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.topology,
            # So many devices of one process.
            topology=f"1x1x{num_devices}",
            target_config=gpu.target_config(target),
        ).devices
    else:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology
        ).devices
    if len(devices) < num_devices:
        raise CompileError(
            f"got a mesh of {num_devices} devices for {target.name}, which is compiled for"
            f" {len(devices)}"
        )
    kinds = wanted.axis_types if wanted else None
    return Mesh(np.array(devices[:num_devices]).reshape(sizes), names, axis_types=kinds)


def _placed(arguments: Any, mesh: Mesh) -> Any:
    def place(argument: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = argument.sharding
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(
            argument.shape, argument.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, arguments)


def _called(jaxpr: Any) -> tuple[Kernel, ...]:
    return tuple(
        Kernel(name=name, instruction=f"{name}.{index}")
        for index, name in enumerate(names.kernel_names(jaxpr))
    )


def _memory(compiled: Any) -> Memory:
    sizes = compiled.memory_analysis()
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


if __name__ == "__main__":
    main()
