"""Loading an adapter where the device has no memory for it, or fails: who is told, who goes on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from pallasite.engine import ErrorCode, RequestError
from pallasite.engine import programs as programs_module
from pallasite.engine import runtime as runtime_module
from tests.engine.harness import held_open, lively_tensors, random_prompt, tokens
from tests.engine.test_adapters import ROOMY, ask, long
from tests.peft_adapters import Peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    peft = Peft(tensors=lively_tensors(), rank=4, seed=1)
    return peft.write(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def prompts(rng):
    return [random_prompt(rng, n) for n in (5, 40)]


def test_an_adapter_is_on_the_devices_no_earlier_than_it_has_a_slot(engines, folder, monkeypatch):
    """By the loop, that is: two callers could have read two of them."""
    place, threads = runtime_module.place_one, set()

    def note(*arguments):
        threads.add(threading.current_thread().name)
        return place(*arguments)

    monkeypatch.setattr(runtime_module, "place_one", note)
    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folder)
    assert threads == {"engine"}


def test_the_program_that_fills_a_slot_is_in_the_temporaries(engines, monkeypatch):
    programs = engines.get(ROOMY)._runtime.programs
    largest = programs._set_slot
    monkeypatch.setattr(programs_module, "_temporary_bytes", lambda p: 9 if p is largest else 1)
    assert programs.temporary_bytes() == 9


def test_an_adapter_for_which_memory_is_short_is_refused_and_the_others_stay(
    engines, folder, prompts, monkeypatch
):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folder)
        requests = [ask(prompt, name) for prompt in prompts for name in ("", "all")]
        whole = tokens(engine.generate(requests))
        streams = [engine.submit(request) for request in requests]
        with monkeypatch.context() as patch:
            patch.setattr(runtime_module, "place_one", fail)
            with pytest.raises(RequestError, match="devices have no memory for") as caught:
                engine.load_adapter("other", folder)
        assert (caught.value.code, caught.value.field) == (ErrorCode.RESOURCE_EXHAUSTED, "")
        assert [sum((e.token_ids for e in stream), ()) for stream in streams] == whole
        assert engine.adapter_names() == ["all"]
        engine.load_adapter("other", folder)
        assert tokens(engine.generate(requests)) == whole


@pytest.mark.parametrize("gives_away", [False, True], ids=["before it ran", "after it ran"])
def test_a_load_that_fails_on_the_device_ends_what_runs_and_the_engine_goes_on(
    engines, folder, prompts, monkeypatch, gives_away
):
    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folder)
        requests = [ask(prompt, name) for prompt in prompts for name in ("", "all")]
        whole = tokens(engine.generate(requests))
        put, num_open = engine._runtime.programs.set_adapter, []

        def fail(*arguments):
            load = engine.current_load()
            num_open.append((load.num_running, load.num_waiting))
            if gives_away:
                put(*arguments)
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

        held = engine.prefill(ask(prompts[0], "all"), 60.0)
        list(held)
        with held_open(engine, monkeypatch, 200), monkeypatch.context() as patch:
            running = [iter(engine.submit(long(prompts[0], name))) for name in ("", "all") * 4]
            waiting = [engine.submit(request) for request in requests]
            for stream in running:
                next(stream)
            patch.setattr(engine._runtime.programs, "set_adapter", fail)
            with pytest.raises(RequestError, match="all loaded adapters were lost") as caught:
                engine.load_adapter("other", folder)
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert num_open == [(8, 4)]
        for stream in running:
            assert list(stream)[-1].finish.error.code is ErrorCode.UNAVAILABLE
        for stream, request, answer in zip(waiting, requests, whole, strict=True):
            events = list(stream)
            if request.adapter:
                assert events[-1].finish.error.code is ErrorCode.UNAVAILABLE
            else:
                assert sum((event.token_ids for event in events), ()) == answer
        with pytest.raises(RequestError, match="lost with a failed step"):
            engine.decode(held.handle.handle_id, engine.epoch, "", None)
        assert engine.adapter_names() == []
        with pytest.raises(RequestError, match="not loaded; loaded are: none"):
            engine.submit(ask(prompts[0], "all"))
        engine.load_adapter("all", folder)
        assert tokens(engine.generate(requests)) == whole
        assert engine.metrics.is_alive
        assert engine.metrics.compilations == 0


def test_a_device_that_does_not_take_an_adapter_is_told_so_and_nothing_is_lost(
    engines, folder, monkeypatch
):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folder)
        with monkeypatch.context() as patch:
            patch.setattr(runtime_module, "place_one", fail)
            with pytest.raises(RequestError, match="those that are loaded stay") as caught:
                engine.load_adapter("other", folder)
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert engine.adapter_names() == ["all"]


def test_adapters_lost_while_the_engine_recovers_are_forgotten_too(
    engines, folder, prompts, monkeypatch
):
    """A step fails while a load waits, which fails then: no name may stand for an empty slot."""

    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    with engines.fresh(ROOMY) as engine, ThreadPoolExecutor() as pool:
        engine.load_adapter("all", folder)
        loads = []

        def fail_with_a_load_waiting(*arguments):
            loads.append(pool.submit(engine.load_adapter, "other", folder))
            while not engine._intake._commands:
                time.sleep(0.01)
            fail()

        with monkeypatch.context() as patch:
            patch.setattr(engine._runtime.programs, "set_adapter", fail)
            patch.setattr(engine._runtime, "run", fail_with_a_load_waiting)
            stream = engine.submit(ask(prompts[0], "all"))
            assert list(stream)[-1].finish.error.code is ErrorCode.UNAVAILABLE
            with pytest.raises(RequestError, match="all loaded adapters were lost"):
                loads[0].result(60)
        assert len(loads) == 1
        assert engine.adapter_names() == []
        with pytest.raises(RequestError, match="not loaded; loaded are: none"):
            engine.submit(ask(prompts[0], "all"))
