"""The host's state of one completion: its tokens, how far they are computed, what it holds."""

import enum
import secrets
import time
from dataclasses import dataclass, field

from pallasite.engine.drafter import Drafter
from pallasite.engine.errors import RequestError
from pallasite.engine.request import (
    Finish,
    FinishReason,
    Request,
    Timing,
    TokenLogprobs,
    Usage,
)
from pallasite.engine.stream import TokenStream


class State(enum.Enum):
    """Where a sequence is. Only a RUNNING one has a slot; FINISHED ones hold nothing."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    HELD = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, kw_only=True)
class Group:
    """The n sequences of one request.

    Attributes:
        prompt_logprobs: an entry a prompt token as they are computed; None where not asked for.
        num_scored: how many of them stand.
    """

    request: Request
    stream: TokenStream
    submitted_s: float
    arrival: int
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_scored: int = 1


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One completion.

    Attributes:
        token_ids: the prompt, then the completion's tokens that the host has seen.
        seed: of its random draws.
        num_computed: positions whose keys and values are in the cache, or will be once the steps
            in flight are done.
        num_sampled: the completion's tokens, those in flight included.
        deadline_s: when it is too late for it, on the monotonic clock.
        num_admitted: tokens when it was last given a slot, all of which the host knew.
        shard: the data shard that serves it; -1 before it has one.
        slot: its place among those that run on its shard; -1 where it does not run.
        adapter_slot: its adapter's place on the device, -1 for none.
        pages: of its shard's part of the cache.
        lease_s: where not None, it pauses after its first token, its pages leased for so long.
        drafter: what drafts its tokens, once it was asked for any.
        draft_tokens: tokens that were drafted for it and verified.
        accepted_tokens: those of them that were right.
    """

    group: Group
    index: int
    seed: int
    token_ids: list[int]
    lease_s: float | None = None
    deadline_s: float | None = None
    state: State = State.WAITING
    shard: int = -1
    slot: int = -1
    adapter_slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sampled: int = 0
    num_admitted: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    drafter: Drafter | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    has_reported: bool = False
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def request(self) -> Request:
        return self.group.request

    @property
    def num_prompt(self) -> int:
        return len(self.group.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens, those in flight included."""
        return self.num_prompt + self.num_sampled

    @property
    def num_in_flight(self) -> int:
        return self.num_tokens - len(self.token_ids)

    @property
    def num_completed(self) -> int:
        """The completion's tokens that the host has seen."""
        return len(self.token_ids) - self.num_prompt

    @property
    def rank(self) -> tuple[int, int, int]:
        """Lower is served first."""
        return (self.group.request.priority, self.group.arrival, self.index)

    @property
    def num_unsampled(self) -> int:
        """The tokens that it may still sample for now, beside those sampled or in flight."""
        limit = self.request.params.max_tokens if self.lease_s is None else 1
        return limit - self.num_sampled

    @property
    def is_saturated(self) -> bool:
        return self.num_unsampled <= 0

    @property
    def needs_scores(self) -> bool:
        scores = self.group.prompt_logprobs
        return scores is not None and self.group.num_scored < self.num_prompt

    def finish(
        self,
        reason: FinishReason,
        now: float,
        *,
        matched: int | str | None = None,
        num_completed: int | None = None,
        error: RequestError | None = None,
    ) -> Finish:
        """Describes its end; it changes nothing."""
        submitted = self.group.submitted_s
        scheduled = now if self.scheduled_s is None else self.scheduled_s
        first = now if self.first_token_s is None else self.first_token_s
        usage = Usage(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=self.num_completed if num_completed is None else num_completed,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )
        timing = Timing(
            queue_s=scheduled - submitted, prefill_s=first - scheduled, decode_s=now - first
        )
        return Finish(reason=reason, usage=usage, timing=timing, matched=matched, error=error)


def new_group(request: Request, stream: TokenStream, arrival: int, lease_s: float | None) -> Group:
    """Makes the group of a request that was just admitted, with its n sequences."""
    now = time.monotonic()
    params = request.params
    group = Group(request=request, stream=stream, submitted_s=now, arrival=arrival)
    if params.prompt_logprobs is not None:
        group.prompt_logprobs = [None] * len(request.prompt_ids)
    seed = secrets.randbits(32) if params.seed is None else params.seed
    for index in range(params.n):
        sequence = Sequence(
            group=group,
            index=index,
            seed=_mix(seed, index),
            token_ids=list(request.prompt_ids),
            lease_s=lease_s,
            deadline_s=None if request.timeout_s is None else now + request.timeout_s,
        )
        group.sequences.append(sequence)
    return group


def _mix(seed: int, index: int) -> int:
    """Folds a seed of up to 64 bits and a completion's index into 32 bits."""
    mixed = seed + index * 0x9E3779B97F4A7C15  # the golden ratio's bits, as in SplitMix64
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF
