"""The engine's token events as text events, stop texts cut; knows no prompt and no protocol."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from pallasite.engine.request import FinishReason, TokenEvent
from pallasite.server.contracts import Engine, TokenStream
from pallasite.server.detokenizer import Detokenizer
from pallasite.server.text_request import TextEvent


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
        if self._num_unfinished:
            self._engine.abort(self.request_id)
        self._on_close()

    def _stop(self, index: int, matched: str, num_tokens: int) -> None:
        self._engine.stop(self.request_id, index, matched, num_tokens)


class Completion:
    """The text of one completion as it grows."""

    __slots__ = ("_detokenizer", "_matched", "_num_tokens")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
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
        else:
            if token_ids:
                delta = self._detokenizer.push(token_ids)
                text = delta.text
                if delta.matched is not None:
                    self._matched = delta.matched
                    token_ids = token_ids[: delta.num_tokens]
                    logprobs = logprobs[: delta.num_tokens]
                self._num_tokens += len(token_ids)
            if self._matched is None:
                if finish is not None:
                    text += self._detokenizer.finish().text
            elif finish is None:
                stop(event.index, self._matched, self._num_tokens)
        if finish is not None and self._matched is not None:
            # The engine may have ended it for a later reason before it heard of the match.
            usage = replace(finish.usage, completion_tokens=self._num_tokens)
            finish = replace(
                finish, reason=FinishReason.STOP, matched=self._matched, usage=usage, error=None
            )
        return TextEvent(
            index=event.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish=finish,
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
