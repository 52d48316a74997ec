"""Programs that one process compiles and others read: the right ones, whole, or none."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import flax
import jax
import jaxlib
import pytest
from jax.experimental import serialize_executable

from pallasite.engine import Engine, EngineConfig, compile_process, program_file, runtime
from pallasite.engine.compile_process import compile_apart
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.planner import MemoryPlan
from pallasite.engine.program_file import ProgramFile, digest_of_code
from pallasite.engine.programs import Programs
from pallasite.models.errors import ConfigError
from pallasite.models.forms import EVERY_LAYER
from pallasite.models.registry import matrix_forms
from pallasite.pallas_kernels.cpu import best_instructions
from tests.engine.harness import ORACLE, greedy, random_prompt, tokens
from tests.tiny_checkpoints import TINY

SMALL = EngineConfig(
    weights="f32", max_requests=2, max_batch_tokens=32, max_context_len=64, num_pages=8
)

# Without a body in C++ no product has one row.
NUM_PROGRAMS = 4 if best_instructions() else 3


def _digest(body):
    return hashlib.sha256(body).digest()


def _raise(error):
    raise error


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture
def checkpoint(engines):
    return engines.checkpoint


@pytest.fixture
def said():
    return []


def path(folder, model=TINY, config=SMALL):
    return ProgramFile(folder, plan_deployment(model, config)).path


def load(checkpoint, cache, said, config=SMALL):
    return Engine.load(checkpoint, replace(config, compile_cache=cache), said.append)


def answers(engine, rng):
    """Greedy tokens of a long and a short prompt; each is the float64 model's, to rounding."""
    requests = [greedy(random_prompt(rng, n), max_tokens=6, ignore_eos=True) for n in (40, 3)]
    with engine:
        completions = tokens(engine.generate(requests))
        assert engine.metrics.compilations == engine.metrics.misses == 0
    for request, ids in zip(requests, completions, strict=True):
        logits = ORACLE.logits((*request.prompt_ids, *ids))[len(request.prompt_ids) - 1 : -1]
        gaps = [row.max() - row[token_id] for row, token_id in zip(logits, ids, strict=True)]
        assert max(gaps) < 1e-4
    return completions


def count(said, words):
    return sum(words in line for line in said)


def test_a_first_start_compiles_in_another_process_and_a_second_only_reads(
    checkpoint, tmp_path, said, rng, monkeypatch
):
    monkeypatch.setattr(Programs, "compile", lambda *_: pytest.fail("compiled here"))
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 1, said
    assert count(said, f"read {NUM_PROGRAMS} compiled programs") == 1
    assert [p.suffix for p in tmp_path.glob("*.programs")] == [".programs"]

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another process"))
    said.clear()
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 0
    assert count(said, f"read {NUM_PROGRAMS} compiled programs") == 1


def test_without_a_cache_the_programs_are_compiled_here(checkpoint, said, rng, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another process"))
    answers(load(checkpoint, None, said), rng)
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 1


@pytest.mark.parametrize("content", [b"", b"short", _digest(b"a whole body") + b"a whole bo"])
def test_a_file_that_is_not_whole_is_made_again(checkpoint, tmp_path, said, rng, content):
    file = path(tmp_path)
    file.write_bytes(content)
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 1
    assert count(said, f"read {NUM_PROGRAMS} compiled programs") == 1
    assert file.stat().st_size > 100_000


@pytest.mark.parametrize("refuses", ["JAX", "the disk"])
def test_a_file_that_cannot_be_used_is_made_again_or_done_without(
    checkpoint, tmp_path, said, rng, monkeypatch, refuses
):
    if refuses == "JAX":
        load(checkpoint, tmp_path, said).close()
        said.clear()

        def refuse(*_, **__):
            raise jax.errors.JaxRuntimeError("made by another")

        monkeypatch.setattr(serialize_executable, "deserialize_and_load", refuse)
    else:
        path(tmp_path).mkdir()
    answers(load(checkpoint, tmp_path, said), rng)
    status = 0 if refuses == "JAX" else 1
    assert count(said, f"left no programs, status {status}; compiling here") == 1


def test_a_file_of_another_user_is_read(checkpoint, tmp_path, said, rng, monkeypatch):
    load(checkpoint, tmp_path, said).close()
    said.clear()
    monkeypatch.setattr(os, "utime", lambda *_: _raise(PermissionError("not yours")))
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 0


def test_a_folder_that_cannot_be_written_is_done_without(checkpoint, tmp_path, said, rng, capfd):
    folder = tmp_path / "file"
    folder.touch()
    deployment = plan_deployment(TINY, SMALL)
    file = ProgramFile(folder, deployment)
    assert file.read() is None
    assert compile_apart(deployment, file, said.append) == 1
    assert said == [], "nothing is compiled in vain"
    assert "cannot be kept in" in capfd.readouterr().err


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    file = ProgramFile(tmp_path, plan_deployment(TINY, SMALL))
    file.path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: _raise(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        file.write([b"new"])
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_file_gives_back_what_was_written(tmp_path):
    file = ProgramFile(tmp_path, plan_deployment(TINY, SMALL))
    programs = [b"one", b"", bytes(range(256)) * 300]
    file.write(programs)
    assert file.read() == programs
    assert file.path.stat().st_mode & 0o777 == 0o644 & ~_umask()


@pytest.mark.parametrize("harm", ["others may write it", "it is another's"])
def test_a_file_that_others_could_have_written_is_not_read(tmp_path, monkeypatch, harm):
    file = ProgramFile(tmp_path, plan_deployment(TINY, SMALL))
    file.write([b"one"])
    assert file.read() == [b"one"]
    if harm == "others may write it":
        file.path.chmod(0o664)
    else:
        os.chown(file.path, 12345, -1)
    assert file.read() is None


def test_a_load_that_fails_ends_the_other_process(checkpoint, tmp_path, said, monkeypatch):
    monkeypatch.setattr(runtime, "_load", lambda *_: _raise(ConfigError("a torn tensor")))
    with pytest.raises(ConfigError, match="a torn tensor"):
        load(checkpoint, tmp_path, said)
    assert count(said, "compiled program") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["it fails", "it cannot be started", "it sees another JAX"])
def test_where_the_other_process_leaves_nothing_we_say_so_and_compile_here(
    checkpoint, tmp_path, said, rng, monkeypatch, capfd, way
):
    status = 1
    if way == "it fails":
        job, status = "import sys; sys.exit(7)", 7
        popen = subprocess.Popen
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **more: popen([*command[:-1], job], **more)
        )
    elif way == "it cannot be started":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
        status = None
    else:
        monkeypatch.setattr(compile_process, "jax_settings", dict)
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, f"the process that compiles left no programs, status {status}") == 1
    assert count(said, f"compiled program 2 of {NUM_PROGRAMS}") == 1
    assert list(tmp_path.glob("*.programs")) == []
    if way == "it sees another JAX":
        assert "another JAX" in capfd.readouterr().err


def test_an_interrupt_ends_the_other_process(checkpoint, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def record(*arguments, **more):
        started.append(popen(*arguments, **more))
        return started[-1]

    def interrupt(line):
        if "compiled program" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", record)
    config = replace(SMALL, compile_cache=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Engine.load(checkpoint, config, interrupt)
    [process] = started
    assert process.returncode == -9
    assert list(tmp_path.glob("*.programs")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_epsilon", 1e-6),
        ("rope_theta", 9999.0),
        ("num_layers", TINY.num_layers + 1),
        ("vocab_size", TINY.vocab_size + 1),
    ],
)
def test_another_model_has_another_name(tmp_path, name, value):
    assert path(tmp_path, replace(TINY, **{name: value})) != path(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", "bf16"),
        ("max_requests", 3),
        ("max_batch_tokens", 33),
        ("max_context_len", 80),
        ("num_pages", 9),
    ],
)
def test_another_shape_has_another_name(tmp_path, name, value):
    assert path(tmp_path, config=replace(SMALL, **{name: value})) != path(tmp_path)


def test_what_no_program_depends_on_is_not_in_the_name(tmp_path):
    other = replace(SMALL, max_waiting=3, max_lease_s=1.0, compile_cache=tmp_path)
    assert path(tmp_path, config=other) == path(tmp_path)


def test_other_flags_settings_code_or_processors_have_other_names(tmp_path, monkeypatch):
    names = {path(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        names.add(path(tmp_path))
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        names.add(path(tmp_path))
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    with monkeypatch.context() as patch:
        patch.setattr(program_file, "_CODE", "another")
        names.add(path(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        names.add(path(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "another")
        names.add(path(tmp_path))
    for module in (jax, jaxlib, flax):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            names.add(path(tmp_path))
    assert len(names) == 9
    assert path(tmp_path) in names


def test_the_content_of_a_file_of_flags_is_in_the_name(tmp_path, monkeypatch):
    flags = tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(flags))
    names = {path(tmp_path)}
    for content in ("--xla_a", "--xla_b"):
        flags.write_text(content)
        names.add(path(tmp_path))
    assert len(names) == 3


def test_the_code_is_digested_file_by_file(tmp_path):
    code = tmp_path / "engine"
    shutil.copytree(Path(program_file.__file__).parent, code)
    digests = [digest_of_code([code])]
    (code / "step.py").write_bytes((code / "step.py").read_bytes() + b"\n")
    digests.append(digest_of_code([code]))
    (code / "step.py").rename(code / "step2.py")
    digests.append(digest_of_code([code]))
    (code / "within").mkdir()
    (code / "within" / "body.so").write_bytes(b"\0")
    digests.append(digest_of_code([code]))
    assert len(set(digests)) == 4
    (code / "__pycache__").mkdir(exist_ok=True)
    (code / "__pycache__" / "step.pyc").write_bytes(b"whatever")
    assert digest_of_code([code]) == digests[-1]
    archive = zipfile.ZipFile(
        shutil.make_archive(str(tmp_path / "code"), "zip", tmp_path, "engine")
    )
    assert digest_of_code([zipfile.Path(archive, "engine/")]) == digests[-1]


def test_jaxs_own_cache_is_no_part_of_the_name(tmp_path):
    before = path(tmp_path)
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "elsewhere"))
    try:
        assert path(tmp_path) == before
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_the_files_read_least_recently_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(program_file, "MAX_FILES", 2)
    deployment = plan_deployment(TINY, SMALL)
    files = [ProgramFile(tmp_path, deployment.with_pages(num_pages)) for num_pages in (8, 9, 10)]
    for age, file in enumerate(files[:2]):
        file.write([b"program"])
        os.utime(file.path, (0, 1000 + age))
    assert files[0].read() == [b"program"]
    files[2].write([b"program"])
    assert [file.read() for file in files] == [[b"program"], None, [b"program"]]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    file = ProgramFile(tmp_path, plan_deployment(TINY, SMALL))
    old, young = tmp_path / "a.new", tmp_path / "b.new"
    for path_ in (old, young):
        path_.write_bytes(b"half")
    os.utime(old, (0, time.time() - 3700))
    file.write([b"whole"])
    assert sorted(tmp_path.iterdir()) == sorted([young, file.path])


def test_a_load_that_fails_late_stops_counting_compilations(checkpoint, monkeypatch, said):
    closed = []
    close = Programs.close
    monkeypatch.setattr(Programs, "close", lambda self: (closed.append(self), close(self)))

    def does_not_fit(plan):
        if plan.temporaries:
            raise ConfigError("does not fit")

    monkeypatch.setattr(MemoryPlan, "check", does_not_fit)
    with pytest.raises(ConfigError, match="does not fit"):
        load(checkpoint, None, said)
    assert len(closed) == 1


@pytest.mark.parametrize("weights", ["auto", "bf16"])
def test_the_process_that_compiles_plans_the_same_model(weights, tmp_path):
    """It is told the planned model, whose forms may have come from a GGUF's blocks."""
    blocks = ((EVERY_LAYER, "q4_1"),)
    config = replace(SMALL, weights=weights)
    plan = plan_deployment(replace(TINY, block_forms=blocks), config)
    again = plan_deployment(plan.model.config, config)
    assert ProgramFile(tmp_path, plan).path == ProgramFile(tmp_path, again).path
    forms = set(matrix_forms(plan.model).values())
    uses_blocks = weights == "auto" and best_instructions() != ""
    assert forms == ({"q4_1", "bf16"} if uses_blocks else {"bf16"})
