"""One completion gathered from its events, as the command line shows it."""

from collections.abc import Sequence
from typing import Any

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import Finish, FinishReason, TokenLogprobs
from pallasite.server.text_request import TextEvent


class Answer:
    """A completion so far.

    Attributes:
        text: all of its text.
        token_ids: all of its tokens.
        finish: how it ended, once it has.
    """

    def __init__(self, index: int) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self._index = index
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    def push(self, event: TextEvent) -> None:
        """Adds an event of this completion."""
        self.text += event.text
        self.token_ids += event.token_ids
        self._logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = list(event.prompt_logprobs)
        self.finish = event.finish or self.finish

    def check(self) -> None:
        """Raises RequestError where the completion did not end, or did so by a fault."""
        if self.finish is None:
            raise RequestError(
                "the stream ended before the completion did; ask again", code=ErrorCode.UNAVAILABLE
            )
        if self.finish.reason is FinishReason.ERROR:
            raise self.finish.error or RequestError(
                "the completion failed; ask again", code=ErrorCode.INTERNAL
            )

    def as_json(self) -> dict[str, Any]:
        """The completion as `--json` prints it; call `check` before."""
        assert self.finish is not None
        usage, timing = self.finish.usage, self.finish.timing
        row: dict[str, Any] = {
            "index": self._index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish.reason.value,
            "matched": self.finish.matched,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "draft_tokens": usage.draft_tokens,
                "accepted_tokens": usage.accepted_tokens,
            },
            "timing": {
                "queue_s": timing.queue_s,
                "prefill_s": timing.prefill_s,
                "decode_s": timing.decode_s,
            },
        }
        if self._logprobs:
            row["logprobs"] = [_place(place) for place in self._logprobs]
        if self._prompt_logprobs is not None:
            row["prompt_logprobs"] = [_place(place) for place in self._prompt_logprobs]
        return row


def rates(answers: Sequence[Answer]) -> str:
    """What completions of one prompt cost, in a line; call `Answer.check` before."""
    finishes = [answer.finish for answer in answers if answer.finish is not None]
    prompt = finishes[0].usage.prompt_tokens
    num_tokens = sum(finish.usage.completion_tokens for finish in finishes)
    first_s = min(finish.timing.queue_s + finish.timing.prefill_s for finish in finishes)
    decode_s = max(finish.timing.decode_s for finish in finishes)
    line = (
        f"{prompt} prompt tokens, {num_tokens} completion tokens; first token after {first_s:.3f} s"
    )
    num_later = num_tokens - len(finishes)
    if num_later > 0 and decode_s > 0:
        line += f", then {num_later / decode_s:.1f} tokens/s"
    return line


def _place(place: TokenLogprobs | None) -> dict[str, Any] | None:
    if place is None:
        return None
    return {
        "token_id": place.token_id,
        "logprob": place.logprob,
        "top": [list(pair) for pair in place.top],
    }
