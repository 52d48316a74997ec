"""The engine: requests in from any thread, one loop that steps the device, events out.

The loop plans a step from counts, launches it, and only then reads what the step before sampled,
so that the device never waits for the host. Only where drafts may pay, or where the host's cores
are the device, does it read first.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pallasite.engine.adapters import AdapterTable
from pallasite.engine.audit import PageAudit, audit
from pallasite.engine.commit import Committer
from pallasite.engine.config import EngineConfig
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.errors import RequestError, closed_error, late_error, step_error
from pallasite.engine.intake import Intake
from pallasite.engine.leases import LeaseTable
from pallasite.engine.metrics import EngineLoad, EngineMetrics
from pallasite.engine.offline import collect
from pallasite.engine.request import Completion, FinishReason, KvHandle, Request
from pallasite.engine.runtime import Runtime, load_runtime
from pallasite.engine.sequence import Group, Sequence, State
from pallasite.engine.speculation import Speculator
from pallasite.engine.step_times import step_seconds
from pallasite.engine.stepper import Launched, Stepper
from pallasite.engine.stream import TokenStream, wake
from pallasite.engine.validation import Bounds, check_request_id, validate, validate_prefill

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_FAILURES = 3
"""Steps that fail one after another before the engine gives up."""

IDLE_S = 0.25
"""How often an idle loop looks at deadlines and shows that it is alive."""


class Engine:
    """Serves one model. Every method may be called from any thread.

    Attributes:
        epoch: this start's random name; KV handles are bound to it.
        max_context_len: prompt and completion tokens of one completion at most.
    """

    def __init__(self, runtime: Runtime, config: EngineConfig) -> None:
        self.config = config
        self.model_config = runtime.model_config
        self.weight_forms = runtime.weight_forms
        self.max_context_len = runtime.max_context_len
        self.metrics = EngineMetrics(programs=runtime.programs)
        self._runtime = runtime
        num_shards, num_pages = runtime.num_shards, runtime.cache_spec.num_pages
        self._scheduler = Dispatcher(
            num_shards, num_pages, runtime.page_size, config.max_requests, config.max_batch_tokens
        )
        eos = runtime.model_config.eos_token_ids
        self._committer = Committer(self._scheduler, eos, config.max_unread_tokens)
        self._stepper = Stepper(runtime, config, self._scheduler, self._committer, self.metrics)
        seconds = step_seconds(runtime) if config.speculate else {}
        self._speculator = Speculator(self._scheduler, config.num_drafts, seconds)
        self._leases = LeaseTable(config.max_leases, config.max_lease_s)
        self._adapters = AdapterTable(config.max_adapters)
        self.epoch = self._leases.epoch
        self._bounds = Bounds(
            vocab_size=runtime.model_config.vocab_size,
            max_context_len=runtime.max_context_len,
            num_cached_tokens=num_pages // num_shards * runtime.page_size,
            limits=config.limits,
        )
        self._intake = Intake(config.max_waiting, self._take_in)
        self._previous: Launched | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        # The interpreter must not end while the loop is inside XLA: that aborts the process.
        atexit.register(self.close)

    @classmethod
    def load(
        cls,
        model: Path | str,
        config: EngineConfig | None = None,
        progress: Callable[[str], None] = lambda message: None,
    ) -> "Engine":
        """Loads a checkpoint, compiles every program and starts the loop.

        `model` is a GGUF file, a Hugging Face folder or a pulled name. Raises ConfigError where it
        is damaged, unknown or does not fit: by its shapes before anything is allocated, by its
        programs before the cache is.
        """
        config = config or EngineConfig()
        return cls(load_runtime(model, config, progress), config)

    # What callers ask for, from their own threads.

    def submit(self, request: Request) -> TokenStream:
        """Admits a request and returns its stream at once.

        Raises RequestError: INVALID_ARGUMENT with the field's name, RESOURCE_EXHAUSTED where too
        many wait, UNAVAILABLE while draining or closed.
        """
        validate(request, self._bounds)
        return self._open(request, None)

    def prefill(self, request: Request, lease_s: float) -> TokenStream:
        """Computes a prompt and its first token, then leases its pages for lease_s seconds.

        The stream ends with that token, and then has the handle; it has none where the token
        already finished the completion. Raises RequestError as `submit` does, and where the lease
        is too long or too many are held.
        """
        validate_prefill(request, self._bounds)
        self._leases.check(lease_s)
        page_size = self._runtime.page_size
        num_pages = -(-len(request.prompt_ids) // page_size)
        promised = self._intake.promised_pages(page_size)
        num_all = self._scheduler.num_pages
        self._leases.reserve(self._leases.max_held(num_pages, promised, num_all))
        try:
            return self._open(request, lease_s)
        except RequestError:
            self._leases.cancel()
            raise

    def decode(
        self,
        handle_id: str,
        epoch: str,
        tenant: str,
        timeout_s: float | None,
        request_id: str = "",
    ) -> TokenStream:
        """Streams what follows the first token of a prefill, sampled as that prefill asked.

        It is a request of its own, named `request_id` or, where that is empty, by a drawn id.

        Raises RequestError: FAILED_PRECONDITION for a handle that is stale, expired or used,
        NOT_FOUND for one that never was, PERMISSION_DENIED for another tenant's.
        """
        check_request_id(request_id, self.config.limits)
        return self._intake.resume(
            lambda: self._leases.take(handle_id, epoch, tenant), timeout_s, request_id
        )

    def release(self, handle_id: str, epoch: str, tenant: str) -> None:
        """Gives a handle's pages back. Raises RequestError as `decode` does."""
        self._leases.release(handle_id, epoch, tenant)
        self._intake.command(lambda: self._collect_leases(time.monotonic()))

    def extend_lease(self, handle_id: str, epoch: str, tenant: str, lease_s: float) -> KvHandle:
        """Makes a lease end lease_s seconds from now. Raises RequestError as `decode` does."""
        self._leases.check(lease_s)
        return self._leases.extend(handle_id, epoch, tenant, lease_s)

    def abort(self, request_id: str) -> bool:
        """Ends a request's completions with reason ABORT; False where no such request is open."""
        group = self._intake.find(request_id)
        return group is not None and self._intake.command(lambda: self._abort(group))

    def stop(self, request_id: str, index: int, matched: str, num_tokens: int) -> None:
        """Ends one completion with reason STOP, since its text matched a stop string.

        `num_tokens` of its tokens count as the completion's. Nothing happens where it has ended.
        """
        group = self._intake.find(request_id)
        if group is not None:
            sequence = group.sequences[index]
            self._intake.command(lambda: self._stop(sequence, matched, num_tokens))

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Runs requests to their end, for offline use; completions come in the order given.

        Raises the first request's RequestError where one is not valid; those before it still run.
        """
        return collect(self.submit, requests)

    def adapter_names(self) -> list[str]:
        """Returns the adapters that requests may name."""
        return self._adapters.names()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a LoRA adapter in the PEFT format between two steps; nothing is compiled.

        Raises ConfigError where it does not fit the model, RequestError where the name is taken,
        there is no room, or the device fails.
        """
        self._ask(lambda: self._slot_for(name))  # before its files are read
        one = self._runtime.read_adapter(folder)

        def load() -> None:
            slot = self._slot_for(name)
            try:
                self._runtime.set_adapter(one, slot)
            finally:
                if not self._runtime.has_adapters:  # a name must not stand for an empty slot
                    self._adapters.clear()
            self._adapters.add(name, slot)

        self._ask(load)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter's name away; requests that use it go on to their ends.

        Raises RequestError NOT_FOUND where it is not loaded.
        """
        self._ask(lambda: self._adapters.remove(name))

    def current_load(self) -> EngineLoad:
        """Returns how busy the engine is."""
        return EngineLoad(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._intake.num_queued,
            num_pages=self._scheduler.num_pages,
            num_free_pages=self._scheduler.num_free_pages,
            num_leased_pages=self._leases.num_pages(),
        )

    def audit(self) -> PageAudit:
        """Counts whose the pages are, between two steps."""
        return self._ask(self._audit)

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for those admitted; whether all ended in time."""
        return self._intake.drain(timeout_s)

    def close(self) -> None:
        """Stops the loop; what is still open ends with UNAVAILABLE."""
        self._intake.close()
        self._thread.join()
        self._runtime.programs.close()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The loop's thread.

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception:  # whatever it is, nobody may be left waiting
            logger.exception("the engine cannot go on")
        self._intake.close()
        self._intake.run_commands()
        for sequence in list(self._scheduler.sequences()):
            self._committer.fail(sequence, closed_error())
        self._deliver()
        self.metrics.is_alive = False

    def _serve(self) -> None:
        num_failures = 0
        while not self._intake.is_closed and num_failures < MAX_FAILURES:
            try:
                self._run_once()
                num_failures = 0
            except Exception as error:  # the loop outlives whatever a step raises
                num_failures += 1
                logger.exception("a step failed; its requests end, the engine goes on")
                self._recover(error)

    def _run_once(self) -> None:
        was_idle = self._previous is None
        # First, for it waits: what is asked for and what ends meanwhile counts for the next plan.
        if self._needs_tokens():
            self._commit_previous()
        self._intake.run_commands()
        if not self._runtime.has_adapters:
            raise RuntimeError("the adapters are lost: one could not be put beside them")
        now = time.monotonic()
        for sequence in self._scheduler.expired(now):
            self._committer.fail(sequence, late_error())
        self._collect_leases(now)
        plan = self._scheduler.schedule(now)
        if plan is not None and self._previous is None:
            plan = self._speculator.with_drafts(plan)
        launched = None if plan is None else self._stepper.launch(plan)
        self._commit_previous()
        self._previous = launched
        self._deliver()
        self.metrics.num_preemptions = self._scheduler.num_preemptions
        self.metrics.last_step_monotonic_s = time.monotonic()
        if launched is None and was_idle:
            self._intake.wait(IDLE_S)

    def _needs_tokens(self) -> bool:
        """Whether the last step is read before the next one is planned.

        Drafts are made of tokens, so that counts are not enough. And where the bodies in C++ keep
        all cores busy, planning beside them takes one away for longer than it takes after them.
        """
        if self._previous is None:
            return False
        if self._runtime.uses_all_cores:
            return True
        return self._previous.plan.has_drafts or self._speculator.awaits_tokens()

    def _commit_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            self._stepper.commit(previous, self._leases.grant)

    def _take_in(self, sequence: Sequence) -> None:
        if sequence.num_sampled:  # a lease held it
            self._scheduler.add(sequence)
            return
        if sequence.index == 0:
            self.metrics.num_requests += 1
            self.metrics.prompt_tokens += sequence.num_prompt
        self._scheduler.add(sequence)
        try:
            sequence.adapter_slot = self._adapters.slot_of(sequence.request.adapter)
        except RequestError as error:  # unloaded since it was admitted
            self._committer.fail(sequence, error)

    def _deliver(self) -> None:
        touched = self._committer.take_touched()
        ended = [group for stream, group in touched.items() if stream.is_complete]
        for group in ended:
            sequence = group.sequences[0]
            if sequence.lease_s is not None and sequence.state is State.FINISHED:
                self._leases.cancel()
        if ended:
            self._intake.forget(ended)
        # Last: who has read the end of a request may give another its id.
        wake(touched)

    def _collect_leases(self, now: float) -> None:
        for sequence in self._leases.collect(now):
            self._scheduler.retire(sequence)

    def _abort(self, group: Group) -> None:
        now = time.monotonic()
        for sequence in group.sequences:
            if sequence.state in (State.WAITING, State.RUNNING):
                self._committer.end(sequence, sequence.finish(FinishReason.ABORT, now))

    def _stop(self, sequence: Sequence, matched: str, num_tokens: int) -> None:
        if sequence.state in (State.WAITING, State.RUNNING):
            finish = sequence.finish(
                FinishReason.STOP, time.monotonic(), matched=matched, num_completed=num_tokens
            )
            self._committer.end(sequence, finish)

    def _recover(self, error: Exception) -> None:
        """After a failed step: what ran ends with UNAVAILABLE, the cache is made anew.

        So does what waits for an adapter, where a load that failed has lost them.
        """
        self._previous = None
        # The leases first, so that no decode of one can be asked for after those that are taken in
        # here, which compute their prompts again.
        revoked = self._leases.revoke_all("was lost with a failed step")
        self._intake.run_commands()
        is_bare = not self._runtime.has_adapters
        for sequence in list(self._scheduler.sequences()):
            is_lost = is_bare and sequence.adapter_slot >= 0
            if sequence.state is State.RUNNING or sequence.num_in_flight or is_lost:
                self._committer.fail(sequence, step_error(error))
        self._scheduler.forget_pages()
        for sequence in revoked:
            self._scheduler.retire(sequence)
        self._runtime.reset()
        self._deliver()

    def _audit(self) -> PageAudit:
        return audit(self._scheduler.pools, self._owners(), self._leases.num_pages())

    def _owners(self) -> list[Sequence]:
        """Every sequence that is open or whose pages are leased."""
        return self._intake.own(lambda: [*self._scheduler.sequences(), *self._leases.sequences()])

    def _slot_for(self, name: str) -> int:
        return self._adapters.slot_for(name, {s.adapter_slot for s in self._owners()})

    def _ask(self, command: Callable[[], _T]) -> _T:
        """Returns what the loop answers between two steps, or what a loop that has ended left."""
        answer = self._intake.ask(command)
        if answer is None:
            self._thread.join()
            return command()
        return answer.result()

    def _open(self, request: Request, lease_s: float | None) -> TokenStream:
        self._adapters.slot_of(request.adapter)
        return self._intake.submit(request, self._scheduler.num_waiting, lease_s)
