"""What the server needs of an engine: the engine has it, and so does a test's fake one."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from pallasite.engine.config import EngineConfig
from pallasite.engine.request import KvHandle, Request, TokenEvent
from pallasite.models.config import ModelConfig


@runtime_checkable
class TokenStream(Protocol):
    """The events of one request; it ends after each of its completions has finished.

    Attributes:
        request_id: names the request for `Engine.abort` and `Engine.stop`.
        handle: of a prefill that has ended, the lease on its pages; None where the first token
            ended the completion.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def handle(self) -> KvHandle | None: ...

    @property
    def is_complete(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...


@runtime_checkable
class EngineLoad(Protocol):
    """How busy an engine is."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_leased_pages(self) -> int: ...


@runtime_checkable
class EngineMetrics(Protocol):
    """An engine's vital signs.

    Attributes:
        compilations: programs compiled since the engine began to serve.
        misses: steps for which no compiled program was found.
        num_drafts: drafts that were verified, of one completion in one step each.
        draft_tokens: their tokens.
        accepted_tokens: those of them that were right.
        last_step_monotonic_s: when the engine's loop last came round, busy or idle.
        is_alive: whether the engine's loop runs.
    """

    @property
    def compilations(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def num_drafts(self) -> int: ...
    @property
    def draft_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def last_step_monotonic_s(self) -> float: ...
    @property
    def is_alive(self) -> bool: ...


@runtime_checkable
class PageAudit(Protocol):
    """The pages of the cache, counted and checked; `problems` is empty where all is well."""

    @property
    def free(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def leased(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def problems(self) -> tuple[str, ...]: ...


@runtime_checkable
class Engine(Protocol):
    """Token ids in, token ids out. Each method may be called from any thread and returns at once,
    but `audit`, `load_adapter` and `unload_adapter`, which wait for the step that runs, and `drain`
    and `close`, which wait for requests. Each raises RequestError where it cannot serve."""

    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def epoch(self) -> str: ...
    @property
    def max_context_len(self) -> int: ...
    @property
    def weight_forms(self) -> Mapping[str, str]: ...
    @property
    def metrics(self) -> EngineMetrics: ...

    def submit(self, request: Request) -> TokenStream: ...

    def abort(self, request_id: str) -> bool: ...

    def stop(self, request_id: str, index: int, matched: str, num_tokens: int) -> None: ...

    def prefill(self, request: Request, lease_s: float) -> TokenStream: ...

    def decode(
        self,
        handle_id: str,
        epoch: str,
        tenant: str,
        timeout_s: float | None,
        request_id: str = "",
    ) -> TokenStream: ...

    def release(self, handle_id: str, epoch: str, tenant: str) -> None: ...

    def extend_lease(self, handle_id: str, epoch: str, tenant: str, lease_s: float) -> KvHandle: ...

    def adapter_names(self) -> list[str]: ...

    def load_adapter(self, name: str, folder: Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...

    def current_load(self) -> EngineLoad: ...

    def audit(self) -> PageAudit: ...

    def drain(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...
