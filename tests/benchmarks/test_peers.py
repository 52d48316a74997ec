"""The children that engines run in, and what is told of those that are not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import install as install_module
from benchmarks.peers.catalogue import BUILD, PEERS, STATE, Peer
from benchmarks.peers.driver import Room
from benchmarks.peers.install import install, table
from benchmarks.peers.process import PeerError, PeerProcess, Program

RUN = subprocess.run
ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = Program(
    name="fake",
    python=Path(sys.executable),
    module="tests.benchmarks.fake_driver",
    environment={"PYTHONPATH": None},
)


def room(*options):
    return Room(
        model="model.gguf",
        folder="folder",
        max_requests=2,
        max_len=16,
        num_tokens=32,
        num_threads=1,
        options=options,
    )


def test_tokens_come_with_their_times():
    with PeerProcess(FAKE) as process:
        process.load(room("step=0.01"))
        assert process.settings["threads"] == 1
        assert process.versions == {"fake": "1.0"}
        process.prepare(2, 9)
        tokens = process.generate([[1, 2, 3], [4, 5, 6]], 5)
    assert [len(times) for times in tokens.times_s] == [5, 5]
    for times in tokens.times_s:
        assert list(times) == sorted(times)
        assert times[0] >= 0.01
        assert times[-1] <= tokens.duration_s
    assert tokens.duration_s >= 0.05


def test_what_a_library_prints_is_no_answer():
    with PeerProcess(FAKE) as process:
        process.load(room("prints"))
        assert process.generate([[1]], 2).duration_s > 0
        assert process.score([1, 2, 3]).top == [2, 3]


def test_no_folder_of_ours_hides_a_package_of_a_peer(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with PeerProcess(FAKE) as process:
        process.load(room())
        path = process.settings["path"]
    assert [place for place in path if Path(place).is_relative_to(ROOT / "benchmarks")] == []
    assert path[-1] == str(ROOT)
    assert path.count(str(ROOT)) == 1


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("fails=generate", "RuntimeError: no generate today"),
        ("unable=generate", "it has no generate"),
        ("short", r"completions of \[1\] tokens; asked for was 2"),
        ("dies=generate", "ended with status 3; it last said: out of memory"),
    ],
)
def test_a_failure_is_told_with_its_reason(option, reason):
    with PeerProcess(FAKE) as process:
        process.load(room(option))
        with pytest.raises(PeerError, match=reason):
            process.generate([[1, 2]], 2)


def test_a_failed_load_and_a_missing_interpreter_are_told():
    with PeerProcess(FAKE) as process, pytest.raises(PeerError, match="no load today"):
        process.load(room("fails=load"))
    missing = Program(name="gone", python=Path("/no/python"), module="x", environment={})
    with pytest.raises(PeerError, match="gone cannot be started"):
        PeerProcess(missing)


def test_a_failed_score_leaves_the_engine_at_work():
    with PeerProcess(FAKE) as process:
        process.load(room("fails=score"))
        with pytest.raises(PeerError, match="no score today"):
            process.score([1, 2, 3])
        assert process.generate([[1]], 1).duration_s > 0


def test_a_peer_that_is_not_installed_says_so(tmp_path):
    state = PEERS[0].state(tmp_path)
    assert state["reason"] == "not installed; run `make peers`"


def fake_pip(monkeypatch, script):
    """Makes every command that an installation runs this Python program."""

    def run(command, **options):
        return RUN([sys.executable, "-c", script, *command], **options)

    monkeypatch.setattr(install_module.subprocess, "run", run)


def test_a_peer_that_does_not_install_is_reported_and_tried_again(tmp_path, monkeypatch):
    peer = Peer(name="odd", requirements=("odd==1.0",), module="none")
    says = "import sys; print('ERROR: no matching distribution'); print('bye'); sys.exit(1)"
    fake_pip(monkeypatch, says)
    reason = install(peer, Path("model.gguf"), tmp_path)
    assert reason.endswith("status 1: ERROR: no matching distribution")
    assert json.loads((tmp_path / "odd" / STATE).read_text())["reason"] == reason
    text = table((peer,), tmp_path)
    assert reason in text
    assert "no" in text.splitlines()[-1].split()
    fake_pip(monkeypatch, 'print(\'[{"name": "odd", "version": "1.0"}]\')')
    assert install(peer, Path("model.gguf"), tmp_path) == ""
    assert peer.state(tmp_path)["versions"] == {"odd": "1.0"}


def test_what_is_installed_is_not_installed_again(tmp_path, monkeypatch):
    peer = Peer(name="odd", requirements=("odd==1.0",), module="none")
    fake_pip(monkeypatch, 'print(\'[{"name": "odd", "version": "1.0"}]\')')
    assert install(peer, Path("model.gguf"), tmp_path) == ""
    fake_pip(monkeypatch, "import sys; sys.exit(1)")
    assert install(peer, Path("model.gguf"), tmp_path) == ""
    newer = Peer(name="odd", requirements=("odd==1.1",), module="none")
    assert install(newer, Path("model.gguf"), tmp_path) != ""


def test_every_peer_is_pinned_and_its_program_is_its_own():
    for peer in PEERS:
        assert all("==" in requirement for requirement in peer.requirements)
        program = peer.program()
        assert program.python.is_relative_to(BUILD / peer.name)
        assert program.environment["PYTHONPATH"] is None
