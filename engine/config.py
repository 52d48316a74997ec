"""What the operator chooses about an engine. Frozen and checked on construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pallasite.models.errors import ConfigError
from pallasite.models.forms import BaseForm, Rule, check_rules
from pallasite.models.kv_cache import CacheForm
from pallasite.models.sharding import MeshShape

DEFAULT_ADAPTER_RANK = 16
DEFAULT_SPECULATE_TOKENS = 7
MAX_SPECULATE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. Every protocol is held to these."""

    max_n: int = 16
    max_logprobs: int = 20
    max_stop_token_ids: int = 16
    max_logit_bias: int = 1024
    max_bad_words: int = 64
    max_bad_word_len: int = 16
    max_request_id_len: int = 128
    max_tenant_len: int = 128


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs one model.

    Attributes:
        weights: the form of weights that `quantize` and the checkpoint give no other. The inputs
            of matrix products have the same type; sums, norms and the residual stream are f32.
            "auto" is bf16, but leaves what a GGUF has quantized as it is on a CPU that multiplies
            it so.
        quantize: rules (pattern, form), see `models/forms.py`: the first whose pattern is found in
            a weight's name gives its form.
        cache: what keys and values are rounded to; "auto" is the type of `weights`, "fp8" is for
            devices that multiply it.
        mesh: the devices. What is counted over requests (max_requests, max_batch_tokens, num_pages)
            is over all data shards, which share it equally.
        max_requests: completions that run at once, one row of a batch each, >= 2 a data shard.
        max_context_len: prompt and completion tokens of one completion at most; None takes the
            model's own limit.
        max_batch_tokens: tokens that one step computes at most, more than max_requests.
        num_pages: pages of the cache; None sizes it from `cache_tokens`.
        cache_tokens: tokens that the cache holds over all requests; None takes all that fits on an
            accelerator, and on a CPU 1,024 a request, but at least one whole context.
        max_adapters: adapters that may be loaded at once; 0 makes no room for any.
        max_adapter_rank: the highest rank of one, for a config with room for any; None takes
            DEFAULT_ADAPTER_RANK.
        speculate: how tokens are drafted, to be verified several a step: "ngram" looks them up
            among the sequence's own. None drafts none.
        speculate_tokens: tokens drafted for a sequence in a step at most, for a config that drafts;
            None takes DEFAULT_SPECULATE_TOKENS.
        max_waiting: requests that wait at most; one more is refused with RESOURCE_EXHAUSTED.
        max_unread_tokens: tokens that a stream's reader may lag before the request is ended.
        max_leases: KV handles held at once at most.
        max_lease_s: the longest lease, in seconds.
        compile_cache: the folder that keeps compiled programs, JAX's own cache among them; None
            keeps none. Whoever may write it may run code here.
    """

    weights: Literal["auto", "bf16", "f32"] = "auto"
    quantize: tuple[Rule, ...] = ()
    cache: Literal["auto", "int8", "fp8"] = "auto"
    mesh: MeshShape = MeshShape()
    max_requests: int = 32
    max_context_len: int | None = None
    max_batch_tokens: int = 512
    num_pages: int | None = None
    cache_tokens: int | None = None
    max_adapters: int = 0
    max_adapter_rank: int | None = None
    speculate: Literal["ngram"] | None = None
    speculate_tokens: int | None = None
    max_waiting: int = 1024
    max_unread_tokens: int = 65536
    max_leases: int = 1024
    max_lease_s: float = 60.0
    compile_cache: Path | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        data = self.mesh.data
        _at_least("max_requests", self.max_requests, 2 * data)
        _at_least("max_batch_tokens", self.max_batch_tokens, self.max_requests + 1)
        _at_least("max_adapters", self.max_adapters, 0)
        _at_least("max_waiting", self.max_waiting, 1)
        _at_least("max_unread_tokens", self.max_unread_tokens, 1)
        _at_least("max_leases", self.max_leases, 0)
        optional = {"max_context_len": 2, "num_pages": 2, "cache_tokens": 2, "max_adapter_rank": 1}
        for name, least in optional.items():
            if (value := getattr(self, name)) is not None:
                _at_least(name, value, least)
        if self.max_adapter_rank is not None and not self.max_adapters:
            raise ConfigError(
                f"got max_adapter_rank={self.max_adapter_rank} and no max_adapters; a rank is"
                " allowed where there is room for adapters; set max_adapters, or leave it out"
            )
        self._check_speculation()
        if self.num_pages is not None and self.cache_tokens is not None:
            raise ConfigError(
                "got both num_pages and cache_tokens; they say the same thing; leave one out"
            )
        if self.weights not in ("auto", "bf16", "f32"):
            raise ConfigError(
                f"got weights={self.weights!r}; allowed are auto, bf16 and f32; choose one"
            )
        if self.cache not in ("auto", "int8", "fp8"):
            raise ConfigError(
                f"got cache={self.cache!r}; allowed are auto, int8 and fp8; choose one"
            )
        check_rules(self.quantize)
        for name in ("max_requests", "max_batch_tokens", "num_pages"):
            value = getattr(self, name)
            if value is not None and value % data:
                raise ConfigError(
                    f"got {name}={value} for {data} data shards, which share it equally; it must"
                    f" be a multiple of {data}; try {-(-value // data) * data}"
                )
        if not self.max_lease_s > 0:
            raise ConfigError(f"got max_lease_s={self.max_lease_s}; it must be > 0; raise it")

    def _check_speculation(self) -> None:
        if self.speculate not in (None, "ngram"):
            raise ConfigError(
                f"got speculate={self.speculate!r}; allowed is ngram, or None for no speculation;"
                " choose one"
            )
        count = self.speculate_tokens
        if count is None:
            return
        if self.speculate is None:
            raise ConfigError(
                f"got speculate_tokens={count} and no speculation; it is allowed where tokens are"
                " drafted; set speculate, or leave it out"
            )
        if not 1 <= count <= MAX_SPECULATE_TOKENS:
            raise ConfigError(
                f"got speculate_tokens={count}; allowed is 1 to {MAX_SPECULATE_TOKENS}; change it"
            )

    @property
    def num_drafts(self) -> int:
        """Tokens that are drafted for a sequence in a step at most; 0 without speculation."""
        if self.speculate is None:
            return 0
        return self.speculate_tokens or DEFAULT_SPECULATE_TOKENS

    @property
    def base_form(self) -> BaseForm:
        """The form of weights that nothing gives another."""
        return "f32" if self.weights == "f32" else "bf16"

    @property
    def cache_form(self) -> CacheForm:
        """What keys and values are rounded to."""
        return self.base_form if self.cache == "auto" else self.cache

    @property
    def adapter_rank(self) -> int:
        """The rank that each slot for an adapter has."""
        return self.max_adapter_rank or DEFAULT_ADAPTER_RANK

    @property
    def requests_per_shard(self) -> int:
        """Completions that run at once in a data shard."""
        return self.max_requests // self.mesh.data

    @property
    def batch_tokens_per_shard(self) -> int:
        """Tokens that a data shard computes in a step at most."""
        return self.max_batch_tokens // self.mesh.data


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"got {name}={value}; it must be at least {least}; raise it")
