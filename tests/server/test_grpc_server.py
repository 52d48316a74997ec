"""The server around the calls: health, reflection, keys, TLS, control, admin, draining."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pallasite.engine.config import EngineConfig
from pallasite.engine.errors import ConfigError
from pallasite.models.forms import EVERY_LAYER
from pallasite.proto import admin_pb2, control_pb2
from pallasite.server.auth import ApiKeys, load_keys
from pallasite.server.client import AsyncClient, RetryPolicy, SamplingParams, Tls
from pallasite.server.config import ServerConfig, TlsFiles
from tests.server.fake_engine import NUM_PAGES, FakeEngine
from tests.server.serving import eventually, serving
from tests.tiny_checkpoints import TINY

SERVICES = ["", "pallasite.v1.Inference", "pallasite.v1.Control", "grpc.health.v1.Health"]
KEYS = {"alice": "a" * 20, "bob": "b" * 20}


async def statuses(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
    return {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for answer in answers}


async def health_becomes(channel, name):
    async with asyncio.timeout(30):
        while await statuses(channel) != {name}:
            await asyncio.sleep(0.02)


async def code_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code()


async def read_all(stream):
    return [event async for event in stream]


async def test_health_follows_the_engines_heartbeat(tmp_path):
    async with serving(tmp_path, stall_s=0.5) as s:
        await health_becomes(s.channel, "SERVING")
        assert await s.client.wait_until_ready(10.0)
        s.engine.metrics.is_alive = False
        await health_becomes(s.channel, "NOT_SERVING")
        s.engine.metrics.is_alive = True
        await health_becomes(s.channel, "SERVING")
        # The loop hangs: nothing says so but that it does not come round.
        with s.engine._lock:
            last = s.engine.metrics.last_step_monotonic_s
            await health_becomes(s.channel, "NOT_SERVING")
            assert time.monotonic() - last >= 0.5
        await health_becomes(s.channel, "SERVING")
        unknown = health_pb2.HealthCheckRequest(service="pallasite.v1.Other")
        call = health_pb2_grpc.HealthStub(s.channel).Check(unknown)
        assert await code_of(call) is grpc.StatusCode.NOT_FOUND


async def listed_services(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        return {service.name for service in answer.list_services_response.service}


async def test_reflection_is_on_for_loopback_and_can_be_turned_off(tmp_path):
    async with serving(tmp_path / "1", admin_port=0) as s:
        names = await listed_services(s.channel)
        assert names == {*SERVICES[1:], "grpc.reflection.v1alpha.ServerReflection"}
        admin = grpc.aio.insecure_channel(s.server.admin_address)
        assert "pallasite.v1.Admin" in await listed_services(admin)
        await admin.close()
    async with serving(tmp_path / "2", reflection=False) as s:
        assert await code_of(listed_services(s.channel)) is grpc.StatusCode.UNIMPLEMENTED
    assert ServerConfig(model=tmp_path, host="0.0.0.0").has_reflection is False
    assert ServerConfig(model=tmp_path, host="::1").has_reflection is True
    assert ServerConfig(model=tmp_path, host="10.0.0.1", reflection=True).has_reflection is True


async def test_keys_make_tenants_and_guard_every_call_but_health(tmp_path):
    async with serving(tmp_path, api_key=KEYS["alice"], api_keys=KEYS, admin_port=0) as s:
        for key in (None, "", "a" * 19, "a" * 21, "c" * 20):
            async with AsyncClient(s.server.address, api_key=key) as stranger:
                calls = (
                    stranger.tokenize("a"),
                    stranger.load(),
                    read_all(stranger.generate("a")),
                )
                for call in calls:
                    assert await code_of(call) is grpc.StatusCode.UNAUTHENTICATED
                assert await stranger.wait_until_ready(10.0)
        async with AsyncClient(s.server.address, api_key=KEYS["bob"]) as bob:
            answer = await s.client.prefill("ab", SamplingParams(max_tokens=4))
            denied = grpc.StatusCode.PERMISSION_DENIED
            assert await code_of(read_all(bob.decode(answer.handle))) is denied
            assert await code_of(bob.release(answer.handle)) is denied
            assert await code_of(bob.extend_lease(answer.handle)) is denied
            assert len(await read_all(s.client.decode(answer.handle))) >= 1
            # It does not end before the others have tried.
            s.engine.is_paused = True
            sampling = SamplingParams(max_tokens=400)
            reading = asyncio.create_task(
                read_all(s.client.generate("ab", sampling, request_id="mine"))
            )
            await eventually(lambda: s.engine.rows)
            assert await bob.abort("mine") is False
            assert await s.client.abort("mine") is True
            s.engine.is_paused = False
            await reading
        assert {request.tenant for request in s.engine.submitted} == {"alice"}
        # The operator's own port is on loopback and takes no tenant's key.
        assert (await s.admin.AuditKv(admin_pb2.AuditKvRequest())).num_pages == NUM_PAGES


def test_keys_that_cannot_be_keys_are_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may call\n\nalice aaaaaaaaaaaaaaaaaaaa\nbob bbbbbbbbbbbbbbbbbbbb\n")
    keys = load_keys(file)
    assert keys == KEYS
    tenants = ApiKeys(keys)
    assert tenants.tenant("Bearer " + "a" * 20) == "alice"
    assert tenants.tenant("bearer " + "b" * 20) == "bob"
    for value in (None, "", "a" * 20, "Basic " + "a" * 20, "Bearer ", "Bearer é", b"\xff"):
        assert tenants.tenant(value) is None, value
    assert ApiKeys({}).tenant(None) == ""
    bad = [{"a b": "k" * 20}, {"a": "short"}, {"a": "k" * 20, "b": "k" * 20}, {"a": "é" * 20}]
    for pairs in bad:
        with pytest.raises(ConfigError) as caught:
            ApiKeys(pairs)
        assert not any(key in str(caught.value) for key in pairs.values())
    for text in ("alice\n", "a " + "k" * 20 + "\na " + "l" * 20, "# none\n", "a b c"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            load_keys(file)
    with pytest.raises(ConfigError):
        load_keys(tmp_path / "none")


async def test_tls_serves_those_who_trust_it(tmp_path):
    # Made for this test alone, by and for 127.0.0.1.
    folder = Path(__file__).parent / "tls"
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    files = TlsFiles(certificate=certificate, private_key=key, client_ca=certificate)
    async with serving(tmp_path, tls=files) as s:
        own = Tls(root_certificates=certificate, certificate=certificate, private_key=key)
        async with AsyncClient(s.server.address, tls=own) as client:
            assert await client.tokenize("a") == [97]
        once = RetryPolicy(max_attempts=1)
        for tls in (None, Tls(root_certificates=certificate)):
            async with AsyncClient(s.server.address, tls=tls, policy=once) as client:
                call = client.tokenize("a", timeout_s=60.0)
                assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
    missing = TlsFiles(certificate=tmp_path / "none", private_key=key)
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        async with serving(tmp_path, tls=missing):
            pass


async def test_control_tells_what_the_server_is(tmp_path):
    async with serving(tmp_path) as s:
        info = await s.client.server_info()
        model = await s.client.model_info()
        models = await s.control.ListModels(control_pb2.ListModelsRequest())
        s.engine.metrics.misses = 3
        s.engine.metrics.num_drafts, s.engine.metrics.draft_tokens = 2, 9
        s.engine.metrics.accepted_tokens = 2**31
        load = await s.client.load()
    assert info.epoch == s.engine.epoch
    assert info.version == "0.1.0"
    assert 0 <= info.uptime_s < 60
    assert list(info.models) == list(models.models) == ["tiny"]
    assert info.max_message_bytes == 32 << 20
    assert (model.family, model.vocab_size, model.num_layers) == ("llama", 320, 2)
    assert (model.max_context_len, list(model.eos_token_ids)) == (512, [258])
    assert model.has_chat_template
    assert (load.num_running, load.num_pages, load.num_program_misses) == (0, NUM_PAGES, 3)
    assert (load.num_drafts, load.draft_tokens, load.accepted_tokens) == (2, 9, 2**31)
    assert (model.speculate, model.speculate_tokens) == ("", 0)


async def test_control_tells_in_what_form_weights_and_the_cache_are(tmp_path):
    rules = (("mlp", "int4:16"), ("embed", "int8"))
    engine = FakeEngine(config=EngineConfig(quantize=rules, cache="int8"))
    async with serving(tmp_path, engine) as s:
        info = await s.client.model_info()
    expected = {
        "model.embed_tokens": "int8",
        "lm_head": "bf16",
        **{f"model.layers.*.self_attn.{x}_proj": "bf16" for x in "qkvo"},
        **{f"model.layers.*.mlp.{x}_proj": "int4:16" for x in ("gate", "up", "down")},
    }
    assert (info.weights, dict(info.weight_forms), info.cache) == ("auto", expected, "int8")
    engine = FakeEngine()
    engine.model_config = replace(TINY, stored_forms=((EVERY_LAYER, "w8a8"),))
    async with serving(tmp_path, engine) as s:
        info = await s.client.model_info()
    forms = dict(info.weight_forms)
    assert {form for name, form in forms.items() if "layers" in name} == {"w8a8"}
    assert (forms["lm_head"], info.cache) == ("bf16", "bf16")


async def test_a_busy_port_and_a_bad_one_are_the_operators_errors(tmp_path):
    async with serving(tmp_path) as s:
        port = int(s.server.address.rpartition(":")[2])
        config = {"model": tmp_path, "port": port}
        server = type(s.server)(ServerConfig(**config), s.engine, s.server._encoder.tokenizer, None)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            await server.start()
        await server.stop()
    for bad in (
        {"port": 65536},
        {"port": 9000, "admin_port": 9000},
        {"host": ""},
        {"max_message_bytes": 1},
        {"max_calls": 0},
        {"drain_s": float("nan")},
        {"stall_s": 0.0},
    ):
        with pytest.raises(ConfigError):
            ServerConfig(model=tmp_path, **bad)


async def test_draining_lets_requests_end_and_refuses_new_ones(tmp_path):
    async with serving(tmp_path, FakeEngine(is_paused=True), admin_port=0) as s:
        sampling = SamplingParams(max_tokens=60)
        streams = [asyncio.create_task(read_all(s.client.generate("ab", sampling)))]
        streams += [asyncio.create_task(read_all(s.client.generate("cd", sampling)))]
        await eventually(lambda: len(s.engine.rows) == 2)
        draining = asyncio.ensure_future(s.admin.Drain(admin_pb2.DrainRequest(timeout_s=60.0)))
        await health_becomes(s.channel, "NOT_SERVING")
        assert s.engine._is_draining
        refused = read_all(s.client.generate("ab"))
        assert await code_of(refused) is grpc.StatusCode.UNAVAILABLE
        assert not draining.done()
        s.engine.is_paused = False
        assert (await draining).is_drained
        for events in await asyncio.gather(*streams):
            assert sum(len(event.token_ids) for event in events) == 60
            assert events[-1].HasField("finish")
        assert s.engine.aborted == []


async def test_a_drain_that_takes_too_long_says_so_and_stop_cuts_it_off(tmp_path):
    async with serving(tmp_path) as s:
        s.engine.is_paused = True
        reading = asyncio.create_task(read_all(s.client.generate("ab", request_id="r")))
        await eventually(lambda: s.engine.rows)
        assert await s.server.drain(0.05) is False
        await s.server.stop()
        code = await code_of(reading)
        await eventually(lambda: s.engine.aborted == ["r"])
        s.engine.is_paused = False
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_admin_audits_profiles_and_flushes_nothing(tmp_path):
    status = grpc.StatusCode
    start, stop = admin_pb2.StartProfileRequest, admin_pb2.StopProfileRequest
    folder = tmp_path / "profile"
    async with serving(tmp_path, admin_port=0, profile_dir=folder) as s:
        audit = await s.admin.AuditKv(admin_pb2.AuditKvRequest())
        assert (audit.num_pages, audit.num_free_pages) == (NUM_PAGES, NUM_PAGES)
        assert list(audit.problems) == []
        flush = s.admin.FlushPrefixCache(admin_pb2.FlushPrefixCacheRequest())
        assert await code_of(flush) is status.UNIMPLEMENTED
        assert await code_of(s.admin.StopProfile(stop())) is status.FAILED_PRECONDITION
        for seconds in (0, -1, 61, float("nan")):
            call = s.admin.StartProfile(start(max_duration_s=seconds))
            assert await code_of(call) is status.INVALID_ARGUMENT
        call = s.admin.Drain(admin_pb2.DrainRequest(timeout_s=float("nan")))
        assert await code_of(call) is status.INVALID_ARGUMENT
        before_s = time.monotonic()
        await s.admin.StartProfile(start(max_duration_s=60.0))
        assert await code_of(s.admin.StartProfile(start())) is status.FAILED_PRECONDITION
        duration_s = (await s.admin.StopProfile(stop())).duration_s
        assert 0 < duration_s < time.monotonic() - before_s
        assert any(path.is_file() for path in folder.rglob("*"))
        await s.admin.StartProfile(start(max_duration_s=0.05))
        await eventually(lambda: s.server._admin._profile._start is None)
        # It ended by itself; StopProfile waits for its writing and then finds none.
        assert await code_of(s.admin.StopProfile(stop())) is status.FAILED_PRECONDITION
    async with serving(tmp_path, admin_port=0) as s:
        assert await code_of(s.admin.StartProfile(start())) is status.FAILED_PRECONDITION
    async with serving(tmp_path) as s:
        assert s.server.admin_address is None
