"""Installs the engines that ours is compared with, each into an environment of its own.

    python -m benchmarks.peers.install [--peer NAME ...]

One that cannot be installed is told, with the reason, and the others are installed all the same.
What is installed is not installed again. The model is one that `pallasite pull` has fetched.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.options import run, say
from benchmarks.peers.catalogue import BUILD, PEERS, STATE, Peer
from pallasite.models.pull import locate
from pallasite.server.arguments import Parser

DEQUANTIZE = Path(__file__).with_name("dequantized.py")


class InstallError(Exception):
    """A step failed; the text says which, and what it said last."""


def main() -> None:
    """Installs, and prints what is there. Raises ConfigError for a name that it does not know."""
    parser = Parser(prog="python -m benchmarks.peers.install", description="Installs peers.")
    names = [peer.name for peer in PEERS]
    parser.add_argument(
        "--peer",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"install this one; again for more (default: {', '.join(names)})",
    )
    parser.add_argument("--model", default="smollm2-135m", help="(default: smollm2-135m)")
    args = parser.parse_args()
    model = locate(args.model)
    wanted = args.peer or names
    for peer in PEERS:
        if peer.name in wanted:
            install(peer, model)
    print(table(PEERS))


def install(peer: Peer, model: Path, build: Path = BUILD) -> str:
    """Installs a peer, and leaves what came of it in its folder. Returns why not, or ""."""
    made_of = [*peer.requirements, *(f"without {name}" for name in peer.unwanted), model.name]
    state = peer.state(build)
    if not state["reason"] and state.get("made_of") == made_of:
        say(f"{peer.name} is already here")
        return ""
    folder = peer.folder(build)
    folder.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    reason, versions = "", {}
    try:
        versions = _install(peer, model, build)
    except InstallError as error:
        reason = str(error)
        say(f"{peer.name} is not installed: {reason}")
    state = {
        "reason": reason,
        "made_of": made_of,
        "seconds": round(time.monotonic() - start_s),
        "versions": versions,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
    return reason


def table(peers: tuple[Peer, ...], build: Path = BUILD) -> str:
    """Returns what is installed and what is not, with the reasons."""
    rows = []
    for peer in peers:
        state = peer.state(build)
        rows.append([peer.name, peer.requirements[0], "no" if state["reason"] else "yes"])
        rows[-1].append(state["reason"] or f"took {state.get('seconds', '?')} s")
    return report.table("peers", ["name", "of", "installed", ""], rows)


def _install(peer: Peer, model: Path, build: Path) -> dict[str, str]:
    """Returns the versions of all that is installed. Raises InstallError."""
    folder = peer.folder(build)
    python = str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    log = folder / "install.log"
    log.write_text("")
    environment = {**os.environ, **dict(peer.build_environment)}
    environment.pop("PYTHONPATH", None)

    def step(what: str, command: list[str]) -> str:
        say(f"{peer.name}: {what}")
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        with log.open("a") as file:
            file.write(done.stdout)
        if done.returncode:
            raise InstallError(f"{what} ended with status {done.returncode}: {_why(done.stdout)}")
        return done.stdout

    step("making an environment", [sys.executable, "-m", "venv", "--clear", str(folder / "venv")])
    step("installing", [*pip, "install", "--no-input", *peer.requirements])
    if peer.unwanted:
        step("taking out what does not load", [*pip, "uninstall", "--yes", *peer.unwanted])
    if peer.dequantizer:
        others = {other.name: other for other in PEERS}
        helper = others[peer.dequantizer].folder(build) / "venv" / "bin" / "python"
        if not helper.exists():
            raise InstallError(f"it needs the environment of {peer.dequantizer}; install that too")
        command = [str(helper), str(DEQUANTIZE), str(model), str(folder / "model")]
        step("writing the model's weights in bf16", command)
    listed = step("listing what is there", [*pip, "list", "--format", "json"])
    # Warnings may stand around it.
    (line,) = (line for line in listed.splitlines() if line.startswith("[{"))
    return {each["name"]: each["version"] for each in json.loads(line)}


def _why(output: str) -> str:
    """The line that tells most of why a command failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it said nothing"])[-1]


if __name__ == "__main__":
    sys.exit(run(main))
