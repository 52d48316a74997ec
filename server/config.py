"""What the operator chooses about a server. Frozen, checked, and it holds the engine's config."""

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pallasite.engine.config import EngineConfig
from pallasite.engine.errors import ConfigError

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """What one request may carry as text, in characters; checked before the text is read.

    Attributes:
        max_text_len: a text prompt, or all the messages of a chat together.
        max_messages: messages of a chat.
        max_stop: stop texts.
        max_stop_len: one stop text.
        max_bad_word_len: one word that may not be completed.
    """

    max_text_len: int = 2_000_000
    max_messages: int = 1024
    max_stop: int = 16
    max_stop_len: int = 256
    max_bad_word_len: int = 256


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files of a server that speaks TLS.

    Attributes:
        certificate: the server's certificate chain.
        private_key: its key.
        client_ca: where given, clients must show a certificate signed by one of these.
    """

    certificate: Path
    private_key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server serves one model.

    Attributes:
        model: the checkpoint, a GGUF file or a Hugging Face folder.
        model_name: what clients call it; empty takes the checkpoint's own file or folder name.
        engine: how the engine runs it.
        adapters: LoRA adapters to load at start, by name: folders in the PEFT format.
        host: the address to listen on.
        port: gRPC's port; 0 picks a free one.
        admin_port: the port of the Admin service, which listens on loopback only; None has none.
        reflection: whether the service descriptors can be asked for; None allows it on loopback.
        tls: speak TLS; None speaks plain HTTP/2.
        api_keys: key by tenant name; where not empty, each call but health and reflection needs
            one.
        max_message_bytes: the largest message that is taken.
        max_calls: calls in flight at most; one more is refused with RESOURCE_EXHAUSTED.
        drain_s: seconds that requests in flight have to end after SIGTERM.
        stall_s: a step that takes this long turns health to NOT_SERVING.
        profile_dir: the folder that Admin.StartProfile writes to; None refuses it.
        text: limits of prompts and texts.
    """

    model: Path
    model_name: str = ""
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    host: str = "127.0.0.1"
    port: int = 9000
    admin_port: int | None = None
    reflection: bool | None = None
    tls: TlsFiles | None = None
    api_keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    max_message_bytes: int = 32 * _MIB
    max_calls: int = 4096
    drain_s: float = 30.0
    stall_s: float = 2.5
    profile_dir: Path | None = None
    text: TextLimits = TextLimits()

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 65536:
                raise ConfigError(f"got {name}={port}; allowed are 0 to 65535; change it")
        if self.port and self.port == self.admin_port:
            raise ConfigError(
                f"got {self.port} for both port and admin_port; they must differ; change one"
            )
        if not self.host:
            raise ConfigError("got an empty host; it must be an address; try 127.0.0.1")
        if not _MIB <= self.max_message_bytes <= 1024 * _MIB:
            raise ConfigError(
                f"got max_message_bytes={self.max_message_bytes}; allowed are {_MIB} to"
                f" {1024 * _MIB}; change it"
            )
        if self.max_calls < 1:
            raise ConfigError(f"got max_calls={self.max_calls}; it must be at least 1; raise it")
        if not (math.isfinite(self.drain_s) and self.drain_s >= 0):
            raise ConfigError(f"got drain_s={self.drain_s}; it must be >= 0; change it")
        if not (math.isfinite(self.stall_s) and self.stall_s > 0):
            raise ConfigError(f"got stall_s={self.stall_s}; it must be > 0; change it")

    @property
    def served_name(self) -> str:
        """The name that clients call the model."""
        return self.model_name or self.model.name.removesuffix(".gguf")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def has_reflection(self) -> bool:
        """Whether the service descriptors can be asked for."""
        return self.is_loopback if self.reflection is None else self.reflection
