"""From what a step sampled to events: tokens appended, ends decided, pages given back."""

import time
from collections.abc import Callable

import numpy as np

from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.plan import Plan, Row
from pallasite.engine.request import (
    Finish,
    FinishReason,
    KvHandle,
    TokenEvent,
    TokenLogprobs,
)
from pallasite.engine.sampler import NONE_ALLOWED, NOT_FINITE, NUM_TOP, OK
from pallasite.engine.sequence import Group, Sequence, State
from pallasite.engine.stream import TokenStream

Grant = Callable[[Sequence, float], KvHandle]
"""Leases the pages of a sequence that has its first token, for some seconds."""


class Committer:
    """Applies a step's results to the sequences that it ran, and collects their events.

    Attributes:
        accepted_tokens: drafted tokens that were right and became part of a completion.
    """

    def __init__(
        self, scheduler: Dispatcher, eos_token_ids: tuple[int, ...], max_unread_tokens: int
    ) -> None:
        self.accepted_tokens = 0
        self._scheduler = scheduler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_unread_tokens = max_unread_tokens
        self._touched: dict[TokenStream, Group] = {}

    def commit(
        self, plan: Plan, results: np.ndarray, scores: np.ndarray | None, grant: Grant
    ) -> int:
        """Takes in the words that `engine/step.py` packed. Returns the tokens that were kept.

        Args:
            results: [shards, B, words], B rows of which a part has the first ones; of a step with
                drafts [shards, T, words], of each token.
            scores: [shards, T, words], of each token; None where no prompt is scored.
        """
        now = time.monotonic()
        has_drafts = plan.has_drafts
        num_kept = 0
        for shard, part in enumerate(plan.parts):
            start = 0
            for index, row in enumerate(part.rows):
                if row.sequence.state is not State.FINISHED:
                    if row.sequence.needs_scores and scores is not None:
                        self._take_scores(row, scores[shard, start : start + row.num_tokens])
                    if row.samples:
                        place = start if has_drafts else index
                        words = results[shard, place : place + 1 + len(row.draft)]
                        num_kept += self._take_samples(row, words, now, grant)
                start += row.num_tokens
        return num_kept

    def take_touched(self) -> dict[TokenStream, Group]:
        """Returns the streams that were put to since the last call, with their groups."""
        touched, self._touched = self._touched, {}
        return touched

    def end(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a sequence: its pages come back and its stream is told."""
        self._scheduler.retire(sequence)
        self._put(sequence, TokenEvent(index=sequence.index, finish=finish))

    def fail(self, sequence: Sequence, error: RequestError) -> None:
        """Ends a sequence with an error."""
        finish = sequence.finish(FinishReason.ERROR, time.monotonic(), error=error)
        self.end(sequence, finish)

    def _take_samples(self, row: Row, words: np.ndarray, now: float, grant: Grant) -> int:
        """Takes a row's samples up to the first that its draft did not foresee."""
        sequence, num_accepted = row.sequence, 0
        if row.draft:
            num_accepted = _num_equal(words[:, 0].tolist(), row.draft)
            self._scheduler.settle(sequence, num_accepted)
            sequence.draft_tokens += len(row.draft)
        num_kept = 0
        for place, one in enumerate(words[: num_accepted + 1]):
            if place and sequence.state is not State.RUNNING:
                break  # the drafted token before it was the last one
            is_drafted = place < num_accepted
            sequence.accepted_tokens += is_drafted
            self.accepted_tokens += is_drafted
            num_kept += self._take_sample(sequence, one, now, grant)
        return num_kept

    def _take_sample(self, sequence: Sequence, words: np.ndarray, now: float, grant: Grant) -> int:
        token_id, status = int(words[0]), int(words[1])
        if status != OK:
            self.fail(sequence, _sampling_error(status))
            return 0
        params = sequence.request.params
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        finish = None
        keeps = True
        if token_id in params.stop_token_ids or (
            token_id in self._eos_token_ids and not params.ignore_eos
        ):
            keeps = params.include_stop
            finish = sequence.finish(
                FinishReason.STOP,
                now,
                matched=token_id,
                num_completed=sequence.num_completed + keeps,
            )
        elif sequence.num_completed + 1 >= params.max_tokens:
            finish = sequence.finish(
                FinishReason.LENGTH, now, num_completed=sequence.num_completed + 1
            )
        sequence.token_ids.append(token_id)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if keeps and params.logprobs is not None:
            logprobs = (_logprobs(words, params.logprobs),)
        event = TokenEvent(
            index=sequence.index,
            token_ids=(token_id,) if keeps else (),
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(sequence),
            finish=finish,
        )
        if finish is not None:
            self._scheduler.retire(sequence)
            self._put(sequence, event)
        elif sequence.lease_s is not None:
            self._scheduler.hold(sequence)
            self._put(sequence, event, grant(sequence, sequence.lease_s))
        else:
            self._put(sequence, event)
            stream = sequence.group.stream
            if stream.is_bounded and stream.num_unread > self._max_unread_tokens:
                self.fail(sequence, _slow_reader_error(self._max_unread_tokens))
        return int(keeps)

    def _take_scores(self, row: Row, words: np.ndarray) -> None:
        group, stop = row.sequence.group, row.sequence.num_prompt
        width = group.request.params.prompt_logprobs
        assert group.prompt_logprobs is not None
        assert width is not None
        for offset in range(min(row.num_tokens, stop - 1 - row.start)):
            group.prompt_logprobs[row.start + 1 + offset] = _logprobs(words[offset], width)
        group.num_scored = max(group.num_scored, min(row.start + row.num_tokens + 1, stop))

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
        scores = sequence.group.prompt_logprobs
        if scores is None or sequence.has_reported:
            return None
        sequence.has_reported = True
        return tuple(scores)

    def _put(self, sequence: Sequence, event: TokenEvent, handle: KvHandle | None = None) -> None:
        stream = sequence.group.stream
        stream.put(event, handle)
        self._touched[stream] = sequence.group


def _num_equal(sampled: list[int], draft: tuple[int, ...]) -> int:
    """Returns how many tokens of a draft come before the first that was not sampled."""
    pairs = enumerate(zip(sampled, draft, strict=False))
    return next((place for place, (ours, drafted) in pairs if ours != drafted), len(draft))


def _logprobs(words: np.ndarray, num_top: int) -> TokenLogprobs:
    values = words.view(np.float32)
    ids = words[3 : 3 + num_top].tolist()
    logprobs = values[3 + NUM_TOP : 3 + NUM_TOP + num_top].tolist()
    top = tuple(pair for pair in zip(ids, logprobs, strict=True) if pair[0] >= 0)
    return TokenLogprobs(token_id=int(words[0]), logprob=float(values[2]), top=top)


def _sampling_error(status: int) -> RequestError:
    if status == NONE_ALLOWED:
        return RequestError(
            "got bad_words, min_tokens and allowed_token_ids that rule out every token together;"
            " at least one must remain; loosen one of them",
            field="sampling",
        )
    assert status == NOT_FINITE
    return RequestError(
        "the model's logits are not finite for this prompt, or a bias or penalty made them so;"
        " this request alone was ended; change the prompt or the penalties",
        code=ErrorCode.INTERNAL,
    )


def _slow_reader_error(limit: int) -> RequestError:
    return RequestError(
        f"got a reader that is more than {limit} tokens behind; that is the most that is kept;"
        " read faster",
        code=ErrorCode.RESOURCE_EXHAUSTED,
    )
