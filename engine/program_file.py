"""Compiled programs in a file, so that a start neither traces nor compiles.

A file is named by all that its programs depend on: versions, flags and settings, devices and
processor, this package's code and the shapes. It is never asked for by a start that differs.
"""

import contextlib
import hashlib
import importlib.resources
import os
import pickle
import platform
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, BinaryIO

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

from pallasite.engine.deployment import Deployment
from pallasite.engine.layout import Bucket
from pallasite.models.weights import named_weights

Table = dict[Bucket | None, jax.stages.Compiled]

MAX_FILES = 64
"""Files kept in one folder; writing one more removes those that were read least recently."""

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")
_TORN_S = 3600.0
_DIGEST_LEN = hashlib.sha256().digest_size


class ProgramFile:
    """Where one deployment's programs are kept.

    Whoever may write the folder may run code as whoever reads it, as with any compiled program.
    """

    def __init__(self, folder: Path, deployment: Deployment) -> None:
        self.path = folder / f"{_key(deployment)}.programs"
        self._devices = list(deployment.mesh.devices.flat)

    def read(self) -> Table | None:
        """Returns the programs, or None where there is no whole file of them that JAX takes."""
        try:
            content = memoryview(self.path.read_bytes())
        except OSError:
            return None
        digest, body = content[:_DIGEST_LEN], content[_DIGEST_LEN:]
        if hashlib.sha256(body).digest() != digest:
            return None
        with contextlib.suppress(OSError):  # another's, or on a disk that is only read
            os.utime(self.path)
        parts = pickle.loads(body)
        with ThreadPoolExecutor(2) as pool:
            try:
                return dict(zip(parts, pool.map(self._load, parts.values()), strict=True))
            except jax.errors.JaxRuntimeError:
                return None

    def check_folder(self) -> None:
        """Raises OSError where no file can be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()

    @contextlib.contextmanager
    def replacing(self) -> Iterator[BinaryIO]:
        """Opens a new file, which takes the place of the old one when the block has ended well.

        Raises OSError where it cannot be written.
        """
        folder = self.path.parent
        new = folder / f"{uuid.uuid4().hex}.new"
        try:
            with new.open("wb") as file:
                yield file
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)
        by_age = sorted(folder.glob("*.programs"), key=_used_at)
        torn = [path for path in folder.glob("*.new") if _used_at(path) < time.time() - _TORN_S]
        for path in (*by_age[:-MAX_FILES], *torn):
            path.unlink(missing_ok=True)

    def _load(self, parts: tuple[bytes, Any, Any]) -> jax.stages.Compiled:
        serialized, inputs, outputs = parts
        return serialize_executable.deserialize_and_load(
            serialized, inputs, outputs, execution_devices=self._devices
        )


def content_of(table: Table) -> bytes:
    """Returns what a file holds of programs, all of which were compiled in this process."""
    body = pickle.dumps(
        {bucket: serialize_executable.serialize(program) for bucket, program in table.items()}
    )
    return hashlib.sha256(body).digest() + body


def jax_settings() -> dict[str, Any]:
    """Returns JAX's settings by name, but those of its own compile cache."""
    caches = ("jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache")
    return {n: v for n, v in jax.config.values.items() if not n.startswith(caches)}


def digest_of_code(packages: Iterable[Traversable]) -> str:
    """Returns a digest of every file of some packages, wherever they lie."""
    digest = hashlib.sha256()
    for package in packages:
        for name, content in _files(package, package.name):
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _files(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        within = f"{name}/{entry.name}"
        if entry.is_file():
            yield within, entry.read_bytes()
        elif entry.name != "__pycache__":
            yield from _files(entry, within)


# Taken when the code is imported: what lies on the disk later may be other code than runs here.
_CODE = digest_of_code(
    importlib.resources.files(f"pallasite.{name}")
    for name in ("engine", "models", "pallas_kernels")
)


def _key(deployment: Deployment) -> str:
    spec = deployment.program_spec()
    devices = deployment.mesh.devices.flat
    facts = (
        (jax.__version__, jaxlib.__version__, flax.__version__, _CODE),
        sorted((name, repr(value)) for name, value in jax_settings().items()),
        [(name, _flags(os.environ.get(name, ""))) for name in _FLAGS],
        [(d.client.platform_version, d.device_kind, d.id) for d in devices],
        _processor(),
        deployment.cache_spec,
        [name for name, _ in named_weights(deployment.model)],
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.model)],
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.state)],
        sorted(spec.layouts.items()),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _flags(value: str) -> str:
    """Returns flags; a value that begins with no dash is the path of a file of them."""
    is_path = value and not value.lstrip().startswith("-") and Path(value).is_file()
    return Path(value).read_text() if is_path else value


def _processor() -> list[str]:
    """The host's instruction set and cores: programs for a CPU are made for those they saw."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = ("model name", "flags", "Features")
    known = {line for line in lines if line.split("\t")[0].strip() in kinds}
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return [platform.machine(), platform.processor(), str(num_cores), *sorted(known)]


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process made room, too
        return 0.0
