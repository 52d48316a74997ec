"""One engine behind gRPC: ports, services, health, reflection and draining."""

import asyncio
import time

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pallasite.engine.errors import ConfigError
from pallasite.proto import admin_pb2, control_pb2, inference_pb2
from pallasite.server.auth import ApiKeys
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.config import ServerConfig, TlsFiles
from pallasite.server.contracts import Engine
from pallasite.server.generate import TextEngine
from pallasite.server.grpc_admin import AdminService
from pallasite.server.grpc_control import ControlService
from pallasite.server.grpc_door import Door
from pallasite.server.grpc_service import InferenceService
from pallasite.server.heartbeat import report_health
from pallasite.server.prompts import PromptEncoder
from pallasite.server.tokenizer import Tokenizer

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"]
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"]

_LOOPBACK = "127.0.0.1"
_POLL_S = 0.01


class GrpcServer:
    """Serves one engine, in the running event loop.

    Attributes:
        address: HOST:PORT that it listens on, once started.
        admin_address: the Admin service's, once started; None where there is none.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
    ) -> None:
        """Raises ConfigError for API keys that cannot be ones."""
        self.address = ""
        self.admin_address: str | None = None
        self._config = config
        self._engine = engine
        self._encoder = PromptEncoder(tokenizer, chat_template, config.text)
        self._text_engine = TextEngine(engine, self._encoder, model_name=config.served_name)
        self._keys = ApiKeys(config.api_keys)
        self._door = self._new_door(self._keys)
        self._health = health.aio.HealthServicer()
        self._admin: AdminService | None = None
        self._servers: list[grpc.aio.Server] = []
        self._reporter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens. Raises ConfigError where a port or a TLS file cannot be used."""
        config = self._config
        server = grpc.aio.server(options=_options(config))
        server.add_generic_rpc_handlers(
            [
                self._door.handlers(_INFERENCE, InferenceService(self._text_engine)),
                self._door.handlers(_CONTROL, ControlService(self._text_engine, config)),
            ]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = [_INFERENCE.full_name, _CONTROL.full_name, health.SERVICE_NAME]
        if config.has_reflection:
            reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)
        self.address = _listen(server, config.host, config.port, config.tls)
        await self._begin(server)
        if config.admin_port is not None:
            await self._start_admin(config.admin_port)
        self._reporter = asyncio.get_running_loop().create_task(
            report_health(self._engine, config.stall_s, self._health, ["", *services])
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests, then tells health NOT_SERVING, and waits for those in flight.

        Returns whether all had ended within timeout_s seconds, their last messages sent.
        """
        deadline = time.monotonic() + timeout_s
        await asyncio.to_thread(self._engine.drain, 0.0)
        await self._health.enter_graceful_shutdown()
        is_drained = await asyncio.to_thread(self._engine.drain, timeout_s)
        while self._door.num_calls and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return is_drained and not self._door.num_calls

    async def stop(self) -> None:
        """Stops listening and cancels what is still in flight. The engine stays."""
        await self._health.enter_graceful_shutdown()
        if self._reporter is not None:
            self._reporter.cancel()
        if self._admin is not None:
            await self._admin.close()
        for server in self._servers:
            await server.stop(None)
        self._encoder.close()

    async def _start_admin(self, port: int) -> None:
        # On loopback the operator needs no key, and a tenant's key gives no right to administer.
        door = self._new_door(ApiKeys({}))
        self._admin = AdminService(
            self._engine,
            self.drain,
            drain_s=self._config.drain_s,
            profile_dir=self._config.profile_dir,
        )
        server = grpc.aio.server(options=_options(self._config))
        server.add_generic_rpc_handlers([door.handlers(_ADMIN, self._admin)])
        reflection.enable_server_reflection([_ADMIN.full_name, reflection.SERVICE_NAME], server)
        self.admin_address = _listen(server, _LOOPBACK, port, None)
        await self._begin(server)

    async def _begin(self, server: grpc.aio.Server) -> None:
        self._servers.append(server)
        await server.start()

    def _new_door(self, keys: ApiKeys) -> Door:
        config = self._config
        return Door(keys, max_message_bytes=config.max_message_bytes, max_calls=config.max_calls)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        # The door refuses what is over the limit by name; gRPC's own limit, which does not name
        # it, stands behind.
        ("grpc.max_receive_message_length", 2 * config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # A caller whose machine has vanished is noticed within 40 s.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Two servers on one port would each get some of the calls.
        ("grpc.so_reuseport", 0),
    ]


def _listen(server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None) -> str:
    """Binds a port and returns its address."""
    name = f"[{host}]" if ":" in host else host
    address = f"{name}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _credentials(tls))
    except RuntimeError as error:
        raise ConfigError(
            f"got {address} to listen on, which cannot be bound; it must be this machine's own and"
            " free; choose another host or port"
        ) from error
    return f"{name}:{bound}"


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        pair = (tls.private_key.read_bytes(), tls.certificate.read_bytes())
        client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"got a TLS file that cannot be read ({type(error).__name__}); it must be a PEM file;"
            " check its name and rights"
        ) from error
    return grpc.ssl_server_credentials([pair], client_ca, client_ca is not None)
