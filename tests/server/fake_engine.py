"""An engine without a model, for tests of what stands above it: it repeats the prompt.

Completion i of a prompt p has the token p[(i + k) % len(p)] at place k. Everything else is as the
real engine does it: validation, admission, streams, aborts, leases, the names of adapters. Of an
adapter it has the name alone: it reads no folder, and the tokens stay the same.
"""

import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from pallasite.engine.adapters import AdapterTable
from pallasite.engine.config import EngineConfig
from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import (
    Finish,
    FinishReason,
    KvHandle,
    Request,
    Timing,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from pallasite.engine.stream import TokenStream, wake
from pallasite.engine.validation import Bounds, validate
from pallasite.models.registry import make_model, matrix_forms
from pallasite.pallas_kernels.target import CPU
from tests.tiny_checkpoints import TINY

NUM_PAGES = 64


@dataclass
class Row:
    """One completion in flight."""

    request: Request
    stream: TokenStream
    index: int
    num_tokens: int = 0
    is_prefill: bool = False
    lease_s: float = 0.0
    deadline_s: float | None = None
    ends: FinishReason | None = None
    matched: int | str | None = None
    error: RequestError | None = None
    completion_tokens: int | None = None


@dataclass
class Lease:
    row: Row
    expires_s: float


@dataclass
class FakeEngine:
    """See the file's docstring. `step_s` is the time between tokens; `fault` is raised, as its
    completion's error, by a prompt that holds its token id.

    `aborted` and `stopped` note what was asked of it.
    """

    step_s: float = 0.001
    fault: tuple[int, RequestError] | None = None
    config: EngineConfig = field(default_factory=EngineConfig)
    is_paused: bool = False

    def __post_init__(self):
        self.model_config = TINY
        self.max_context_len = TINY.context_len
        self.epoch = secrets.token_hex(8)
        self.metrics = SimpleNamespace(
            compilations=0,
            misses=0,
            num_drafts=0,
            draft_tokens=0,
            accepted_tokens=0,
            last_step_monotonic_s=time.monotonic(),
            is_alive=True,
        )
        self.aborted: list[str] = []
        self.stopped: list[tuple[str, int, str, int]] = []
        self.submitted: list[Request] = []
        self.rows: list[Row] = []
        self.leases: dict[str, Lease] = {}
        self.ended_handles: set[str] = set()
        self.adapters = AdapterTable(self.config.max_adapters)
        self._is_draining = self._is_closed = False
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def weight_forms(self):
        config = self.config
        model = make_model(self.model_config, config.base_form, CPU, rules=config.quantize)
        return matrix_forms(model)

    def submit(self, request):
        return self._submit(request, is_prefill=False, lease_s=0.0)

    def prefill(self, request, lease_s):
        return self._submit(request, is_prefill=True, lease_s=lease_s)

    def abort(self, request_id):
        self.aborted.append(request_id)
        with self._lock:
            rows = [row for row in self.rows if row.stream.request_id == request_id]
            for row in rows:
                row.ends = FinishReason.ABORT
        return bool(rows)

    def stop(self, request_id, index, matched, num_tokens):
        self.stopped.append((request_id, index, matched, num_tokens))
        with self._lock:
            for row in self.rows:
                if row.stream.request_id == request_id and row.index == index:
                    row.ends, row.matched = FinishReason.STOP, matched
                    row.completion_tokens = num_tokens

    def decode(self, handle_id, epoch, tenant, timeout_s, request_id=""):
        with self._lock:
            self._check_open()
            row = self._lease(handle_id, epoch, tenant).row
            self._end_lease(handle_id)
            stream = TokenStream(request_id or secrets.token_hex(4))
            deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
            self.rows.append(replace(row, stream=stream, is_prefill=False, deadline_s=deadline_s))
            return stream

    def release(self, handle_id, epoch, tenant):
        with self._lock:
            self._lease(handle_id, epoch, tenant)
            self._end_lease(handle_id)

    def extend_lease(self, handle_id, epoch, tenant, lease_s):
        with self._lock:
            self._lease(handle_id, epoch, tenant).expires_s = time.monotonic() + lease_s
        return KvHandle(handle_id=handle_id, epoch=epoch, expires_in_s=lease_s)

    def adapter_names(self):
        return self.adapters.names()

    def load_adapter(self, name, folder):
        with self._lock:
            self.adapters.add(name, self.adapters.slot_for(name, ()))

    def unload_adapter(self, name):
        with self._lock:
            self.adapters.remove(name)

    def current_load(self):
        with self._lock:
            return SimpleNamespace(
                num_running=len(self.rows),
                num_waiting=0,
                num_pages=NUM_PAGES,
                num_free_pages=NUM_PAGES - len(self.rows) - len(self.leases),
                num_leased_pages=len(self.leases),
            )

    def audit(self):
        load = self.current_load()
        return SimpleNamespace(
            free=load.num_free_pages,
            used=load.num_running,
            leased=load.num_leased_pages,
            total=NUM_PAGES,
            problems=(),
        )

    def drain(self, timeout_s):
        self._is_draining = True
        end = time.monotonic() + timeout_s
        while self.rows and time.monotonic() < end:
            time.sleep(0.002)
        return not self.rows

    def close(self):
        self._is_closed = self._is_draining = True
        self._thread.join()

    def _submit(self, request, *, is_prefill, lease_s):
        limits = self.config.limits
        validate(
            request,
            Bounds(
                vocab_size=TINY.vocab_size,
                max_context_len=self.max_context_len,
                num_cached_tokens=10**6,
                limits=limits,
            ),
        )
        with self._lock:
            self.adapters.slot_of(request.adapter)
            self._check_open()
            if len(self.rows) >= self.config.max_requests + self.config.max_waiting:
                raise RequestError(
                    "got a request while the queue is full; wait; try again later",
                    code=ErrorCode.RESOURCE_EXHAUSTED,
                    retry_after_s=0.05,
                )
            self.submitted.append(request)
            stream = TokenStream(request.request_id or secrets.token_hex(4), request.params.n)
            deadline_s = None
            if request.timeout_s is not None:
                deadline_s = time.monotonic() + request.timeout_s
            self.rows += [
                Row(
                    request=request,
                    stream=stream,
                    index=index,
                    is_prefill=is_prefill,
                    lease_s=lease_s,
                    deadline_s=deadline_s,
                )
                for index in range(request.params.n)
            ]
        return stream

    def _check_open(self):
        if self._is_draining:
            raise RequestError(
                "got a request while the engine drains; it takes no more; go to another",
                code=ErrorCode.UNAVAILABLE,
            )

    def _lease(self, handle_id, epoch, tenant):
        if epoch != self.epoch or handle_id in self.ended_handles:
            raise RequestError(
                "got a handle that has ended; prefill again",
                code=ErrorCode.FAILED_PRECONDITION,
                field="handle",
            )
        if handle_id not in self.leases:
            raise RequestError("got a handle that never was", code=ErrorCode.NOT_FOUND)
        lease = self.leases[handle_id]
        if lease.row.request.tenant != tenant:
            raise RequestError("got another's handle", code=ErrorCode.PERMISSION_DENIED)
        return lease

    def _end_lease(self, handle_id):
        del self.leases[handle_id]
        self.ended_handles.add(handle_id)

    def _loop(self):
        while not self._is_closed:
            if self.metrics.is_alive:
                self.metrics.last_step_monotonic_s = time.monotonic()
            if not self.is_paused:
                with self._lock:
                    rows = list(self.rows)
                    for row in rows:
                        self._step(row)
                    now = time.monotonic()
                    for handle_id in [k for k, v in self.leases.items() if v.expires_s < now]:
                        self._end_lease(handle_id)
                wake(dict.fromkeys(row.stream for row in rows))
            time.sleep(self.step_s)

    def _step(self, row):
        params, prompt = row.request.params, row.request.prompt_ids
        if row.deadline_s is not None and time.monotonic() > row.deadline_s:
            row.error = RequestError("too late", code=ErrorCode.DEADLINE_EXCEEDED)
        if self.fault is not None and self.fault[0] in prompt:
            row.error = self.fault[1]
        if row.error is not None:
            row.ends = FinishReason.ERROR
        is_first = row.num_tokens == 0
        token_ids: tuple[int, ...] = ()
        if row.ends is None:
            token_id = prompt[(row.index + row.num_tokens) % len(prompt)]
            row.num_tokens += 1
            if token_id in params.stop_token_ids:
                row.ends, row.matched = FinishReason.STOP, token_id
            if row.ends is None or params.include_stop:
                token_ids = (token_id,)
            if row.ends is None and row.num_tokens == params.max_tokens:
                row.ends = FinishReason.LENGTH
        handle = finish = None
        if row.ends is not None:
            finish = self._finish(row)
            self.rows.remove(row)
        elif row.is_prefill:
            handle = KvHandle(
                handle_id=secrets.token_hex(16), epoch=self.epoch, expires_in_s=row.lease_s
            )
            self.leases[handle.handle_id] = Lease(row, time.monotonic() + row.lease_s)
            self.rows.remove(row)
        places = ()
        if params.logprobs is not None:
            places = tuple(place(token_id, params.logprobs) for token_id in token_ids)
        prompt_logprobs = None
        if is_first and params.prompt_logprobs is not None:
            prompt_logprobs = (None, *[place(i, params.prompt_logprobs) for i in prompt[1:]])
        row.stream.put(
            TokenEvent(
                index=row.index,
                token_ids=token_ids,
                logprobs=places,
                prompt_logprobs=prompt_logprobs,
                finish=finish,
            ),
            handle,
        )

    def _finish(self, row):
        count = row.num_tokens if row.completion_tokens is None else row.completion_tokens
        return Finish(
            reason=row.ends,
            usage=Usage(
                prompt_tokens=len(row.request.prompt_ids),
                cached_tokens=0,
                completion_tokens=count,
            ),
            timing=Timing(queue_s=0.25, prefill_s=0.5, decode_s=1.0),
            matched=row.matched,
            error=row.error,
        )


def place(token_id, num_top):
    """The log-probabilities at a place: -token_id / 100 for the token, and descending ones."""
    top = tuple((rank, -rank - 0.5) for rank in range(num_top))
    return TokenLogprobs(token_id=token_id, logprob=-token_id / 100, top=top)
