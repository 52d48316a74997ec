"""Every cap, on every protocol: refused before admission, by the field's name, and quickly."""

import statistics
import time

import grpc
import pytest

from pallasite.engine import ErrorCode, RequestError
from pallasite.server.client import SamplingParams, bad_fields
from tests.engine.bad_requests import refused, request
from tests.server.test_grpc_bad_input import BAD_SAMPLING


def test_the_engine_refuses_what_is_beyond_a_cap(engine, repetitions, figures):
    num_requests = engine.metrics.num_requests
    cases = refused(engine._bounds)
    times = []
    for _ in range(repetitions(1, 20)):
        for field, fields in cases:
            bad = request(**fields)
            for call in (engine.submit, lambda bad: engine.prefill(bad, 1.0)):
                start = time.perf_counter()
                with pytest.raises(RequestError) as caught:
                    call(bad)
                times.append(1000 * (time.perf_counter() - start))
                assert caught.value.code is ErrorCode.INVALID_ARGUMENT
                assert caught.value.field == field
    assert engine.audit().free == engine.audit().total
    assert engine.metrics.num_requests == num_requests
    figures(caps=len(cases), median_ms=round(statistics.median(times), 3))


async def test_grpc_refuses_what_is_beyond_a_cap(engine, door, repetitions, figures):
    num_requests = engine.metrics.num_requests
    times = []
    async with door(engine) as client:
        for _ in range(repetitions(1, 20)):
            for name, sampling in BAD_SAMPLING:
                params = SamplingParams(**sampling)
                start = time.perf_counter()
                with pytest.raises(grpc.RpcError) as caught:
                    [event async for event in client.generate("ab", params)]
                times.append(1000 * (time.perf_counter() - start))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert bad_fields(caught.value) == [f"sampling.{name}"]
                with pytest.raises(grpc.RpcError) as caught:
                    await client.prefill("ab", params)
                assert bad_fields(caught.value) == [f"request.sampling.{name}"]
    assert engine.metrics.num_requests == num_requests
    figures(caps=len(BAD_SAMPLING), median_ms=round(statistics.median(times), 3))
