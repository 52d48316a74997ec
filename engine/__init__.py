"""The serving engine: scheduling, batching, the compiled step, sampling, streams."""

from pallasite.engine.config import EngineConfig, Limits
from pallasite.engine.engine import Engine
from pallasite.engine.errors import ConfigError, ErrorCode, RequestError
from pallasite.engine.request import (
    Completion,
    Finish,
    FinishReason,
    KvHandle,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from pallasite.engine.stream import TokenStream

__all__ = [
    "Completion",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "ErrorCode",
    "Finish",
    "FinishReason",
    "KvHandle",
    "Limits",
    "Request",
    "RequestError",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprobs",
    "TokenStream",
]
