"""What every test runs under: strict types, eight CPU devices, printed seeds.

That warnings are errors is said in pyproject.toml.
"""

import contextlib
import os
import secrets
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# Read once, when JAX is first imported.
assert "jax" not in sys.modules, "a pytest plugin imported jax before its flags were set"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES_FLAG}".strip()

from jaxtyping import install_import_hook

# Every annotated shape and type in pallasite.* is checked at each call.
install_import_hook("pallasite", "beartype.beartype")

import hypothesis
import jax

from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shared machine makes any deadline a coin toss; pytest-timeout bounds each test instead.
hypothesis.settings.register_profile("pallasite", deadline=None, print_blob=True)
# For runs that only ask whether a test fails.
hypothesis.settings.register_profile(
    "unshrunk",
    parent=hypothesis.settings.get_profile("pallasite"),
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("pallasite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="repeat as often as the figures say")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One seed for the whole run, Hypothesis's and the `rng` fixture's; drawn unless given."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbelow(2**32))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seed = terminalreporter.config.option.hypothesis_seed
    terminalreporter.write_line(f"random tests ran with --hypothesis-seed={seed}")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test alone, made from its name and the run's printed seed."""
    seed = zlib.crc32(str(request.config.option.hypothesis_seed).encode())
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def repetitions(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`repetitions(few, full)`: the first, or with `--full` the second, how often to repeat."""
    return lambda few, full: full if pytestconfig.option.full else few


@pytest.fixture(scope="session")
def real_model_path() -> Path:
    """The pulled SmolLM2-135M-Instruct, a GGUF file."""
    try:
        return locate("smollm2-135m")
    except ConfigError as error:
        pytest.skip(f"needs the real model: {error}")


_CACHES = pytest.StashKey[tuple[Path, Path]]()


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A persistent compilation cache that lasts one run, shared by its tests.

    JAX's own files in it are this process's. An engine's programs, which are written whole or not
    at all, go to the run's other processes, if any, after each test.
    """
    folder = tmp_path_factory.mktemp("compile_cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        everyones = tmp_path_factory.getbasetemp().parent / "programs"
        everyones.mkdir(exist_ok=True)
        pytestconfig.stash[_CACHES] = folder, everyones
        _link_programs(everyones, folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _CACHES in item.config.stash:
        own, everyones = item.config.stash[_CACHES]
        _link_programs(everyones, own)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if _CACHES in item.config.stash:
        _link_programs(*item.config.stash[_CACHES])


def _link_programs(source: Path, target: Path) -> None:
    for path in source.glob("*.programs"):
        with contextlib.suppress(FileExistsError):
            os.link(path, target / path.name)
