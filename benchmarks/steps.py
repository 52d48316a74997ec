"""How long each compiled program runs, and what the host does around it: the loop without overlap.

The engine's own parts, called one after another, each with a clock around it. So what the device
and the host take stands apart, which the engine's own loop hides by overlapping them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from pallasite.engine.batch_builder import BatchBuilder
from pallasite.engine.commit import Committer
from pallasite.engine.config import EngineConfig
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.layout import Bucket
from pallasite.engine.programs import EDIT_TOKENS
from pallasite.engine.request import KvHandle, Request, SamplingParams
from pallasite.engine.runtime import Runtime
from pallasite.engine.sampler_state import slot_edits
from pallasite.engine.sequence import Sequence as EngineSequence
from pallasite.engine.sequence import new_group
from pallasite.engine.stream import TokenStream


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step's parts, in seconds.

    Attributes:
        num_tokens: tokens that were wanted; the bucket computes its own number.
        num_cached: tokens of all rows that were in the cache before.
        schedule_s: deciding who runs, in which pages.
        admit_s: giving slots to those that just came; 0 where none did.
        build_s: filling in the words that the program reads.
        launch_s: until the call of the program returned.
        wait_s: from then until its results were read.
        commit_s: from results to events.
        cpu_s: CPU time of all threads during launch and wait; what others run on the machine does
            not add to it, as it does to the rest.
    """

    bucket: Bucket
    num_tokens: int
    num_cached: int
    schedule_s: float
    admit_s: float
    build_s: float
    launch_s: float
    wait_s: float
    commit_s: float
    cpu_s: float

    @property
    def device_s(self) -> float:
        """The program itself, its call included."""
        return self.launch_s + self.wait_s

    @property
    def host_s(self) -> float:
        """What a step needs of the host before and after, which overlap hides or does not."""
        return self.schedule_s + self.build_s + self.commit_s


class StepDriver:
    """A runtime's loop by hand. Nothing else may use the runtime meanwhile."""

    def __init__(self, runtime: Runtime, config: EngineConfig) -> None:
        self._runtime = runtime
        num_shards, num_pages = runtime.num_shards, runtime.cache_spec.num_pages
        self._scheduler = Dispatcher(
            num_shards, num_pages, runtime.page_size, config.max_requests, config.max_batch_tokens
        )
        self._builder = BatchBuilder(runtime.layouts, num_shards, config.max_requests // num_shards)
        self._eos = runtime.model_config.eos_token_ids
        self._committer = Committer(self._scheduler, self._eos, config.max_unread_tokens)
        self._arrivals = count()

    def run(
        self, requests: Sequence[Request], adapter_slots: Sequence[int] | None = None
    ) -> list[StepTime]:
        """Runs requests to their end; returns their steps in order.

        `adapter_slots` are the requests' adapters; None gives them none.
        """
        self.add(requests, adapter_slots)
        steps = []
        while (step := self.step()) is not None:
            steps.append(step)
        return steps

    def add(self, requests: Sequence[Request], adapter_slots: Sequence[int] | None = None) -> None:
        """Has requests wait for the next steps."""
        for request, slot in zip(requests, adapter_slots or [-1] * len(requests), strict=True):
            group = new_group(request, TokenStream("", 1), next(self._arrivals), None)
            for sequence in group.sequences:
                sequence.adapter_slot = slot
                self._scheduler.add(sequence)

    def step(self) -> StepTime | None:
        """Runs the next step; returns None where nothing is left to be done."""
        clock = time.perf_counter
        times = [clock()]
        plan = self._scheduler.schedule(time.monotonic())
        if plan is None:
            return None
        times.append(clock())
        for sequence in plan.admitted:
            self._admit(sequence)
        times.append(clock())
        bucket = self._runtime.bucket_for(plan)
        words = self._builder.build(plan, bucket, self._eos)
        times.append(clock())
        cpu_start_s = time.process_time()
        results, _ = self._runtime.run(bucket, words)
        times.append(clock())
        host_results = np.asarray(results)
        times.append(clock())
        cpu_s = time.process_time() - cpu_start_s
        self._committer.commit(plan, host_results[:, 0], None, _no_lease)
        self._committer.take_touched()
        times.append(clock())
        schedule_s, admit_s, build_s, launch_s, wait_s, commit_s = np.diff(times).tolist()
        return StepTime(
            bucket=bucket,
            num_tokens=plan.num_tokens,
            num_cached=sum(row.start for row in plan.rows),
            schedule_s=schedule_s,
            admit_s=admit_s if plan.admitted else 0.0,
            build_s=build_s,
            launch_s=launch_s,
            wait_s=wait_s,
            commit_s=commit_s,
            cpu_s=cpu_s,
        )

    def _admit(self, sequence: EngineSequence) -> None:
        self._builder.admit(sequence)
        request = sequence.request
        edits = slot_edits(request.params, request.prompt_ids, [], sequence.slot, EDIT_TOKENS)
        for edit in edits:
            self._runtime.edit(edit, sequence.shard)


def time_buckets(
    runtime: Runtime, config: EngineConfig, prompt_len: int, num_steps: int
) -> dict[Bucket, list[StepTime]]:
    """Times at least `num_steps` steps of every bucket, all rows or tokens of all shards in use.

    Decode steps have `prompt_len` tokens and those decoded before them in the cache. The first
    step of each bucket is left out.
    """
    driver = StepDriver(runtime, config)
    steps: dict[Bucket, list[StepTime]] = {}
    # A bucket's sizes are one shard's; equal requests are dealt out evenly.
    num_shards = runtime.num_shards
    for bucket in runtime.programs.buckets:
        num_requests = num_shards * (1 if bucket.has_prefill else bucket.num_rows)
        if bucket.has_prefill:
            one = random_requests(runtime, num_requests, bucket.num_tokens, 1)
            runs = [one] * (num_steps + 1)
        else:
            # The first requests decode while the last ones' prompts are still computed.
            budget = config.max_batch_tokens // num_shards - bucket.num_rows
            num_prefills = -(-bucket.num_rows * prompt_len // budget)
            runs = [
                random_requests(runtime, num_requests, prompt_len, num_prefills + num_steps + 3)
            ]
        times = [step for requests in runs for step in driver.run(requests)]
        full = num_shards * bucket.num_tokens
        own = [step for step in times if step.bucket == bucket and step.num_tokens == full]
        steps[bucket] = own[1:]
        assert len(steps[bucket]) >= num_steps, f"{len(steps[bucket])} steps of {bucket}"
    return steps


def random_requests(
    runtime: Runtime, count: int, prompt_len: int, max_tokens: int
) -> list[Request]:
    """Returns `count` greedy requests that all run to `max_tokens`, of random prompts."""
    rng = np.random.default_rng(prompt_len)
    prompts = rng.integers(0, runtime.model_config.vocab_size, (count, prompt_len))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts.tolist()]


def _no_lease(sequence: EngineSequence, lease_s: float) -> KvHandle:
    raise AssertionError("nothing here asks for a lease")
