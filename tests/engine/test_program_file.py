"""Programs that one process compiles and others read: the right ones, whole, or none."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from pallasite.engine import Engine, EngineConfig, compile_process, program_file
from pallasite.engine.compile_process import compile_apart
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.planner import MemoryPlan
from pallasite.engine.program_file import ProgramFile
from pallasite.engine.programs import Programs
from pallasite.models.errors import ConfigError
from tests.engine.harness import ORACLE, greedy, random_prompt, tokens
from tests.tiny_checkpoints import TINY

SMALL = EngineConfig(
    weights="f32", max_requests=2, max_batch_tokens=32, max_context_len=64, num_pages=8
)


def _digest(body):
    return hashlib.sha256(body).digest()


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
    assert count(said, "compiled program 2 of 3") == 1, said
    assert count(said, "read 3 compiled programs") == 1
    assert [p.suffix for p in tmp_path.glob("*.programs")] == [".programs"]

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another process"))
    said.clear()
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, "compiled program 2 of 3") == 0
    assert count(said, "read 3 compiled programs") == 1


def test_without_a_cache_the_programs_are_compiled_here(checkpoint, said, rng, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another process"))
    answers(load(checkpoint, None, said), rng)
    assert count(said, "compiled program 2 of 3") == 1


@pytest.mark.parametrize("content", [b"", b"short", _digest(b"a whole body") + b"a whole bo"])
def test_a_file_that_is_not_whole_is_made_again(checkpoint, tmp_path, said, rng, content):
    file = path(tmp_path)
    file.write_bytes(content)
    answers(load(checkpoint, tmp_path, said), rng)
    assert count(said, "compiled program 2 of 3") == 1
    assert count(said, "read 3 compiled programs") == 1
    assert file.stat().st_size > 100_000


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
    assert count(said, f"the process that compiles ended with status {status}") == 1
    assert count(said, "compiled program 2 of 3") == 1
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


def test_the_name_is_the_same_in_another_process(tmp_path):
    deployment = plan_deployment(TINY, SMALL)
    file = ProgramFile(tmp_path, deployment)
    assert compile_apart(deployment, file, lambda line: None) == 0
    assert list(tmp_path.glob("*.programs")) == [file.path]


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
    for function in ("_code_digest", "_processor"):
        with monkeypatch.context() as patch:
            patch.setattr(program_file, function, lambda: "another")
            names.add(path(tmp_path))
    assert len(names) == 5
    assert path(tmp_path) in names


def test_jaxs_own_cache_is_no_part_of_the_name(tmp_path):
    before = path(tmp_path)
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "elsewhere"))
    try:
        assert path(tmp_path) == before
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_the_files_read_least_recently_make_room(checkpoint, tmp_path, said, monkeypatch):
    monkeypatch.setattr(program_file, "MAX_FILES", 2)
    deployment = plan_deployment(TINY, SMALL)
    programs = Programs(deployment.program_spec())
    programs.compile(said.append)
    programs.close()
    mesh = deployment.mesh
    files = [ProgramFile(tmp_path, deployment.with_pages(num_pages)) for num_pages in (8, 9, 10)]
    for file in files[:2]:
        file.write(programs.table)
    assert files[0].read(mesh).keys() == programs.table.keys()
    files[2].write(programs.table)
    assert files[1].read(mesh) is None
    assert files[0].read(mesh) is not None
    assert files[2].read(mesh) is not None
    assert len(list(tmp_path.iterdir())) == 2, "nothing half written is left"


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
