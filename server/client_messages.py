"""How a caller's words become messages and channels, for both clients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from pallasite.proto import inference_pb2 as pb

Prompt = str | Sequence[int] | pb.ChatPrompt

MAX_MESSAGE_BYTES = 32 << 20
POLL_S = 0.1
NOT_YET = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Retries are this file's, which knows RetryInfo and that a stream that began is not repeated.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How a client trusts the server.

    Attributes:
        root_certificates: a PEM file of authorities; None takes the system's.
        certificate, private_key: PEM files that the client shows, where the server asks.
    """

    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's form of it. Raises OSError for a file that cannot be read."""
        files = (self.root_certificates, self.private_key, self.certificate)
        return grpc.ssl_channel_credentials(
            *(None if file is None else file.read_bytes() for file in files)
        )


def generate_request(
    prompt: Prompt, sampling: pb.SamplingParams | None, priority: int, adapter: str
) -> pb.GenerateRequest:
    """The message of a prompt (a text, token ids or a chat) and sampling parameters."""
    request = pb.GenerateRequest(sampling=sampling, adapter=adapter or None)
    if priority:
        request.priority = priority
    _set_prompt(request, prompt)
    return request


def score_request(prompt: Prompt, top: int, priority: int, adapter: str) -> pb.ScoreRequest:
    """The message that scores a prompt."""
    request = pb.ScoreRequest(top=top, adapter=adapter or None)
    if priority:
        request.priority = priority
    _set_prompt(request, prompt)
    return request


def tokenize_request(prompt: Prompt) -> pb.TokenizeRequest:
    """The message that tokenizes a text or a chat."""
    request = pb.TokenizeRequest()
    _set_prompt(request, prompt)
    return request


def chat_prompt(messages: Iterable[Mapping[str, str]]) -> pb.ChatPrompt:
    """The prompt of a chat's messages, each with "role" and "content"."""
    return pb.ChatPrompt(
        messages=[
            pb.ChatMessage(role=message["role"], content=message["content"]) for message in messages
        ]
    )


def call_metadata(api_key: str | None, request_id: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call."""
    metadata: tuple[tuple[str, str], ...] = ()
    if api_key is not None:
        metadata += (("authorization", f"Bearer {api_key}"),)
    if request_id:
        metadata += (("x-request-id", request_id),)
    return metadata


def request_id_of(metadata: Iterable[tuple[str, Any]] | None) -> str:
    """The request's name in a call's initial metadata, or ""."""
    return str(dict(metadata or ()).get("x-request-id", ""))


def _set_prompt(
    request: pb.GenerateRequest | pb.ScoreRequest | pb.TokenizeRequest, prompt: Prompt
) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, pb.ChatPrompt):
        request.chat.CopyFrom(prompt)
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
