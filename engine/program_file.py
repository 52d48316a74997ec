"""Compiled programs in a file, so that a start neither traces nor compiles.

A file is named by all that its programs depend on: versions, devices, flags, the code of this
package and the shapes. Nothing of it is true for another; it is never asked for by one.
"""

import hashlib
import os
import pickle
import platform
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from pallasite.engine.deployment import Deployment

Programs = Mapping[Any, jax.stages.Compiled]

MAX_FILES = 64
"""Files kept in one folder; writing one more removes those that were read least recently."""

_PACKAGES = ("engine", "models", "pallas_kernels")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_DIGEST_LEN = hashlib.sha256().digest_size


class ProgramFile:
    """Where one deployment's programs are kept.

    Whoever may write the folder may run code as whoever reads it, as with any compiled program.
    """

    def __init__(self, folder: Path, deployment: Deployment) -> None:
        self.path = folder / f"{_key(deployment)}.programs"

    def read(self, mesh: Mesh) -> dict[Any, jax.stages.Compiled] | None:
        """Returns the programs, on this mesh, or None where there is no whole file of them."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = content[:_DIGEST_LEN], content[_DIGEST_LEN:]
        if hashlib.sha256(body).digest() != digest:
            return None
        os.utime(self.path)
        devices = list(mesh.devices.flat)

        def load(parts: tuple[bytes, Any, Any]) -> jax.stages.Compiled:
            serialized, inputs, outputs = parts
            return serialize_executable.deserialize_and_load(
                serialized, inputs, outputs, execution_devices=devices
            )

        parts = pickle.loads(body)
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(parts, pool.map(load, parts.values()), strict=True))

    def write(self, programs: Programs) -> None:
        """Writes the programs, all or nothing. They must have been compiled in this process."""
        body = pickle.dumps(
            {name: serialize_executable.serialize(program) for name, program in programs.items()}
        )
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(file.name, self.path)
        by_age = sorted(folder.glob("*.programs"), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-MAX_FILES]:
            path.unlink(missing_ok=True)


def jax_settings() -> dict[str, Any]:
    """Returns JAX's settings by name, but those of its own compile cache."""
    caches = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache")
    return {n: v for n, v in jax.config.values.items() if not n.startswith(caches)}


def _key(deployment: Deployment) -> str:
    spec = deployment.program_spec()
    devices = deployment.mesh.devices.flat
    facts = (
        jax.__version__,
        jaxlib.__version__,
        sorted((name, repr(value)) for name, value in jax_settings().items()),
        [(name, os.environ.get(name)) for name in _FLAGS],
        [(d.client.platform_version, d.device_kind, d.id) for d in devices],
        _processor(),
        _code_digest(),
        deployment.cache_spec,
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.model)],
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.state)],
        sorted(spec.layouts.items()),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _processor() -> list[str]:
    """The host's instruction set: programs for a CPU are made for the one that compiled them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = ("model name", "flags", "Features")
    known = {line for line in lines if line.split("\t")[0].strip() in kinds}
    return [platform.machine(), platform.processor(), *sorted(known)]


def _code_digest() -> str:
    """The code that decides what the programs are."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
