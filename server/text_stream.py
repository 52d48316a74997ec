"""The engine's token events as text events, stop texts cut, and as scores; knows no protocol."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import (
    Finish,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from pallasite.server.contracts import Engine, TokenStream
from pallasite.server.detokenizer import Detokenizer
from pallasite.server.text_request import Scores, TextEvent


class TextStream:
    """The events of one request, with text. Iterate once, then `close`."""

    def __init__(
        self,
        engine: Engine,
        stream: TokenStream,
        completions: list["Completion"],
        on_close: Callable[[], object],
    ) -> None:
        self.request_id = stream.request_id
        self._engine = engine
        self._stream = stream
        self._on_close = on_close
        self._completions = completions
        self._num_unfinished = len(completions)

    async def __aiter__(self) -> AsyncIterator[TextEvent]:
        async for event in self._stream:
            text_event = self._completions[event.index].push(event, self._stop)
            if text_event is None:
                continue
            if text_event.finish is not None:
                self._num_unfinished -= 1
            yield text_event

    def close(self) -> None:
        """Aborts the request unless it has ended."""
        # A stream that is complete has ended in the engine, and another may have its id by now.
        if self._num_unfinished and not self._stream.is_complete:
            self._engine.abort(self.request_id)
        self._on_close()

    def _stop(self, index: int, matched: str, num_tokens: int) -> None:
        self._engine.stop(self.request_id, index, matched, num_tokens)


class Completion:
    """The text of one completion as it grows."""

    __slots__ = ("_detokenizer", "_matched", "_num_tokens", "_textless_ids")

    def __init__(self, detokenizer: Detokenizer, textless_ids: frozenset[int]) -> None:
        """`textless_ids` are those that the model knows and the tokenizer does not."""
        self._detokenizer = detokenizer
        self._textless_ids = textless_ids
        self._num_tokens = 0
        self._matched: str | None = None

    def push(self, event: TokenEvent, stop: Callable[[int, str, int], None]) -> TextEvent | None:
        """The event with its text; None where a stop text had matched before and it says no more.

        `stop` is called with the index, the stop text and the number of tokens up to it where one
        matches before the engine has ended the completion.
        """
        finish = event.finish
        token_ids, logprobs, text = event.token_ids, event.logprobs, ""
        if self._matched is not None:
            if finish is None:
                return None
            token_ids, logprobs = (), ()
        elif token_ids:
            text, num_tokens = self._text_of(token_ids)
            token_ids, logprobs = token_ids[:num_tokens], logprobs[:num_tokens]
            self._num_tokens += num_tokens
            if self._matched is not None and finish is None:
                stop(event.index, self._matched, self._num_tokens)
        if finish is not None:
            if self._matched is None:
                rest = self._detokenizer.finish()
                text, self._matched = text + rest.text, rest.matched
            finish = self._finish(finish)
        return TextEvent(
            index=event.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish=finish,
        )

    def _text_of(self, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """The text that the ids add, and how many of them belong to the completion."""
        if self._textless_ids.isdisjoint(token_ids):
            delta = self._detokenizer.push(token_ids)
            self._matched = delta.matched
            return delta.text, delta.num_tokens
        places = [i for i, x in enumerate(token_ids) if x not in self._textless_ids]
        delta = self._detokenizer.push([token_ids[i] for i in places])
        self._matched = delta.matched
        is_cut = delta.matched is not None
        return delta.text, places[delta.num_tokens - 1] + 1 if is_cut else len(token_ids)

    def _finish(self, finish: Finish) -> Finish:
        """The completion's end: the stop text's where one matched, whatever ended it later."""
        if self._matched is None:
            return finish
        return replace(
            finish,
            reason=FinishReason.STOP,
            matched=self._matched,
            usage=replace(finish.usage, completion_tokens=self._num_tokens),
            error=None,
        )


def joined(events: list[TextEvent]) -> TextEvent:
    """Several events of one completion as one."""
    if len(events) == 1:
        return events[0]
    return TextEvent(
        index=events[0].index,
        text="".join(event.text for event in events),
        token_ids=[token_id for event in events for token_id in event.token_ids],
        logprobs=[place for event in events for place in event.logprobs],
        prompt_logprobs=events[0].prompt_logprobs,
        finish=events[-1].finish,
    )


def score_params(top: int) -> SamplingParams:
    """What a request that `scores_of` reads asks for: `top` likeliest tokens at each place."""
    return SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=top, logprobs=top
    )


async def scores_of(engine: Engine, stream: TokenStream, prompt_ids: tuple[int, ...]) -> Scores:
    """Reads the scores of a prompt that was submitted with `score_params`.

    Whoever is cancelled meanwhile has the request aborted. Raises RequestError where it failed.
    """
    places: list[TokenLogprobs] = []
    finish = None
    try:
        async for event in stream:
            places += [place for place in event.prompt_logprobs or () if place is not None]
            places += event.logprobs
            finish = event.finish or finish
    finally:
        if finish is None:
            engine.abort(stream.request_id)
    assert finish is not None, "a stream ended without its finish"
    if finish.error is not None:
        raise finish.error
    if len(places) != len(prompt_ids):
        raise RequestError(
            "the request was aborted before its scores were known; send it again",
            code=ErrorCode.UNAVAILABLE,
        )
    return Scores(
        token_ids=prompt_ids,
        logprobs=(None, *(place.logprob for place in places[:-1])),
        top=tuple(place.top for place in places),
        usage=finish.usage,
        timing=finish.timing,
    )
