"""Compiled programs in a file, so that a start neither traces nor compiles.

A file is named by all that its programs depend on: versions, flags and settings, devices and
processor, this package's code and the shapes. It is never asked for by a start that differs.
"""

import contextlib
import hashlib
import importlib.resources
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

from pallasite.engine.deployment import Deployment
from pallasite.models.weights import named_weights

MAX_FILES = 64
"""Files kept in one folder; writing one more removes those that were read least recently."""

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")
_TORN_S = 3600.0
_SIZE_LEN = 8
_DIGEST_LEN = hashlib.sha256().digest_size


class ProgramFile:
    """Where one deployment's programs are kept.

    What it holds is run by whoever reads it, as any compiled program is.
    """

    def __init__(self, folder: Path, deployment: Deployment) -> None:
        self.path = folder / f"{_key(deployment)}.programs"

    def read(self) -> list[memoryview] | None:
        """Returns the serialized programs, or None where there is no whole file that is trusted.

        Trusted is a file that nobody but this process's user and the system's owner could write.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                    return None
                content = memoryview(file.read())
        except OSError:
            return None
        digest, body = content[:_DIGEST_LEN], content[_DIGEST_LEN:]
        if hashlib.sha256(body).digest() != digest:
            return None
        with contextlib.suppress(OSError):  # another's, or on a disk that is only read
            os.utime(self.path)
        return _split(body)

    def check_folder(self) -> None:
        """Raises OSError where no file can be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path.parent).close()

    def write(self, serialized: Sequence[bytes]) -> None:
        """Writes serialized programs, all or nothing. Raises OSError where it cannot."""
        body = b"".join(len(program).to_bytes(_SIZE_LEN, "big") + program for program in serialized)
        folder = self.path.parent
        new = folder / f"{uuid.uuid4().hex}.new"
        try:
            with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "wb") as file:
                file.write(hashlib.sha256(body).digest() + body)
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)
        by_age = sorted(folder.glob("*.programs"), key=_used_at)
        torn = [path for path in folder.glob("*.new") if _used_at(path) < time.time() - _TORN_S]
        for path in (*by_age[:-MAX_FILES], *torn):
            path.unlink(missing_ok=True)


def _split(body: memoryview) -> list[memoryview]:
    programs = []
    while body:
        size = int.from_bytes(body[:_SIZE_LEN], "big")
        programs.append(body[_SIZE_LEN : _SIZE_LEN + size])
        body = body[_SIZE_LEN + size :]
    return programs


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
        (deployment.cache_spec, deployment.config.base_form, deployment.config.quantize),
        [name for name, _ in named_weights(deployment.model)],
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.model)],
        [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(spec.state)],
        (spec.adapters.num_slots, spec.adapters.rank),
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
