"""Running requests to their end without a server."""

from collections import deque
from collections.abc import Callable, Iterable

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import Completion, Request, TokenLogprobs
from pallasite.engine.stream import TokenStream


def collect(
    submit: Callable[[Request], TokenStream], requests: Iterable[Request]
) -> list[Completion]:
    """Submits requests as fast as the queue takes them; returns completions in their order.

    Raises RequestError where a request is refused for another reason than a full queue.
    """
    completions: list[Completion] = []
    open_streams: deque[tuple[TokenStream, int]] = deque()
    for request in requests:
        while True:
            try:
                stream = submit(request)
            except RequestError as error:
                if error.code is not ErrorCode.RESOURCE_EXHAUSTED or not open_streams:
                    raise
                completions += _read(*open_streams.popleft())
            else:
                stream.is_bounded = False  # it is read, if only after those before it
                open_streams.append((stream, request.params.n))
                break
    for stream, num_completions in open_streams:
        completions += _read(stream, num_completions)
    return completions


def _read(stream: TokenStream, num_completions: int) -> list[Completion]:
    token_ids: list[list[int]] = [[] for _ in range(num_completions)]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_completions)]
    prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
    finishes = {}
    for event in stream:
        token_ids[event.index] += event.token_ids
        logprobs[event.index] += event.logprobs
        if event.prompt_logprobs is not None:
            prompt_logprobs[event.index] = event.prompt_logprobs
        if event.finish is not None:
            finishes[event.index] = event.finish
    return [
        Completion(
            request_id=stream.request_id,
            index=index,
            token_ids=tuple(token_ids[index]),
            logprobs=tuple(logprobs[index]),
            prompt_logprobs=prompt_logprobs.get(index),
            finish=finishes[index],
        )
        for index in range(num_completions)
    ]
