"""Shared engines on a tiny model, and the leak audit after each test that may have used one."""

import pytest

from tests.engine.harness import Engines, engines_of_run


@pytest.fixture(scope="session")
def engines(request):
    """Loads an engine when a test first asks for its configuration; closes all at the end."""
    engines = engines_of_run(request)
    yield engines
    engines.close()


@pytest.fixture
def engine(engines: Engines):
    """The shared engine with pages for all."""
    return engines.get()


@pytest.fixture(autouse=True)
def leak_audit(engines: Engines):
    """Whatever a test did, every page comes back and nothing stays open."""
    yield
    engines.assert_quiet()
