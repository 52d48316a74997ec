"""Faults that are made in kernels on purpose, to see whether their tests see them.

Each is made in a copy of the package in a temporary folder, and its tests run on the copy until one
fails. Tables of faults are elsewhere, such as `attention_mutations.py`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "pallas_kernels"
LIMIT_S = 300
"""Tests that take longer wait for what a fault has left out; without a fault they take a minute or
two."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One fault.

    Attributes:
        name: what is wrong then.
        file: where, within `pallas_kernels/`.
        old: the text that is replaced, which is there once.
        new: what by.
        tests: what pytest is told to run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self) -> str:
        """Returns the file's text with the fault; ValueError where it cannot be made."""
        text = (KERNELS / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"got {text.count(self.old)} times {self.old!r} in {self.file}; the fault"
                f" {self.name!r} must name text that is there once"
            )
        return text.replace(self.old, self.new)


def main(mutations: tuple[Mutation, ...], word: str = "") -> int:
    """Makes the faults that have the word in their name or file, and tells of each.

    Their tests must pass without a fault, which is tried first. Returns the exit status: 1 where
    they do not, and where a fault was not seen or could not be made.
    """
    chosen = [m for m in mutations if word in m.name or word in m.file]
    for tests in dict.fromkeys(m.tests for m in chosen):
        failed = _failed(tests)
        if failed:
            print(f"fails without a fault: {failed}")
            return 1
    unseen = 0
    for mutation in chosen:
        start = time.monotonic()
        failed = _failed(mutation.tests, mutation)
        unseen += not failed
        seconds = f"{time.monotonic() - start:.0f} s"
        seen = f"seen by {failed}" if failed else "NOT SEEN"
        print(f"{seconds:>6}  {mutation.file}: {mutation.name}: {seen}", flush=True)
    print(f"{len(chosen) - unseen} of {len(chosen)} faults seen")
    return int(unseen > 0 or not chosen)


def _failed(tests: tuple[str, ...], mutation: Mutation | None = None) -> str:
    """Returns the first test that fails, or "", on a copy of the package with the fault.

    Raises RuntimeError where the tests do not run on the copy.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "pallasite")
        package.mkdir()
        for name in ("engine", "models", "proto", "server"):
            (package / name).symlink_to(ROOT / name)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(KERNELS, package / "pallas_kernels", ignore=ignored)
        if mutation is not None:
            (package / "pallas_kernels" / mutation.file).write_text(mutation.applied())
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        code = "import pallasite.pallas_kernels as package; print(package.__file__)"
        where = _python(["-c", code], env).stdout.strip()
        if where != str(package / "pallas_kernels" / "__init__.py"):
            raise RuntimeError(f"got the package from {where!r}; the tests would not see a fault")
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
        try:
            done = _python(["-m", "pytest", *options, *tests], env, LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"a test that did not end in {LIMIT_S} s"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"got status {done.returncode} from pytest: {done.stdout[-2000:]}")
    names = re.findall("^FAILED .*?::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return names[0] if done.returncode else ""


def _python(
    arguments: list[str], env: dict[str, str], limit_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s
    )
