"""Where text becomes token ids and token ids become text; every protocol generates through here.

Knows the engine, the encoder of prompts and the streams of text; knows no protocol. All its methods
run in one event loop.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import KvHandle, Request
from pallasite.server.contracts import Engine, TokenStream
from pallasite.server.detokenizer import Detokenizer
from pallasite.server.prompts import PromptEncoder
from pallasite.server.text_request import Scores, TextEvent, TextRequest
from pallasite.server.text_stream import Completion, TextStream, joined, score_params, scores_of

# A lease is forgotten here this long after the engine has ended it.
_HELD_SLACK_S = 5.0


class TextEngine:
    """An engine that speaks text.

    Attributes:
        engine: the engine below.
        encoder: makes token ids of prompts.
        model_name: what clients call the model.
    """

    def __init__(self, engine: Engine, encoder: PromptEncoder, *, model_name: str) -> None:
        self.engine = engine
        self.encoder = encoder
        self.model_name = model_name
        self._textless_ids = encoder.textless_ids(engine.model_config.vocab_size)
        self._held: dict[str, _Held] = {}
        self._owners: dict[str, str] = {}
        self._reapers: set[asyncio.Task[None]] = set()

    async def generate(self, request: TextRequest) -> TextStream:
        """Submits a request. Raises RequestError where it cannot be served."""
        token_request = await self._token_request(request)
        # Only a submitted request is known to be within the limits, n among them.
        stream = self.engine.submit(token_request)
        completions = [self._completion(request) for _ in range(request.params.n)]
        return self._text_stream(stream, completions, request.tenant)

    async def prefill(
        self, request: TextRequest, lease_s: float | None
    ) -> tuple[KvHandle | None, TextEvent]:
        """Computes a prompt and its first token, and leases their pages for lease_s seconds (None:
        as long as the engine allows).

        Returns the handle and the first token's event; where that token ended the completion, None
        and an event with `finish`. Raises RequestError where it cannot be served.
        """
        engine = self.engine
        if request.params.n != 1:
            raise RequestError(
                f"got n={request.params.n} in a prefill; a handle holds one completion; leave n"
                " out",
                field="sampling.n",
            )
        token_request = await self._token_request(request)
        stream = engine.prefill(token_request, self._lease_s(lease_s))
        completion = self._completion(request)
        is_whole = False
        try:
            with self._owned(stream, request.tenant):
                events = [event async for event in stream]
            is_whole = True
        finally:
            if not is_whole:
                engine.abort(stream.request_id)
                self._reap(stream, request.tenant)
        handle = stream.handle
        matches: list[tuple[int, str, int]] = []
        first = joined(
            [
                text_event
                for event in events
                if (text_event := completion.push(event, lambda *match: matches.append(match)))
            ]
        )
        if handle is None:
            return None, first
        if matches:
            # The first token completed a stop text: the engine's own end of it has the usage.
            stream = engine.decode(
                handle.handle_id, handle.epoch, request.tenant, request.timeout_s
            )
            engine.stop(stream.request_id, *matches[0])
            with closing(self._text_stream(stream, [completion], request.tenant)) as rest:
                return None, joined([first, *[event async for event in rest]])
        self._hold(handle, completion)
        return handle, first

    def decode(
        self,
        handle_id: str,
        epoch: str,
        tenant: str,
        timeout_s: float | None,
        request_id: str = "",
    ) -> TextStream:
        """Streams what follows a prefill's first token. Raises RequestError for a handle that is
        stale, expired, used, unknown or another tenant's."""
        stream = self.engine.decode(handle_id, epoch, tenant, timeout_s, request_id)
        held = self._held.pop(handle_id, None)
        if held is None:
            self.engine.abort(stream.request_id)
            raise RequestError(
                "got a handle that another door of this engine made; a handle is decoded where it"
                " was made; use that door",
                code=ErrorCode.FAILED_PRECONDITION,
                field="handle_id",
            )
        return self._text_stream(stream, [held.completion], tenant)

    def release(self, handle_id: str, epoch: str, tenant: str) -> None:
        """Gives a handle's pages back. Raises RequestError as `decode` does."""
        self.engine.release(handle_id, epoch, tenant)
        self._held.pop(handle_id, None)

    def extend_lease(
        self, handle_id: str, epoch: str, tenant: str, lease_s: float | None
    ) -> KvHandle:
        """Begins a handle's lease anew. Raises RequestError as `decode` does."""
        handle = self.engine.extend_lease(handle_id, epoch, tenant, self._lease_s(lease_s))
        held = self._held.get(handle_id)
        if held is not None:
            self._hold(handle, held.completion)
        return handle

    async def score(self, request: TextRequest, top: int) -> Scores:
        """Scores a prompt: `top` of the likeliest tokens at each position. The request's sampling
        parameters are not used. Raises RequestError where it cannot be served."""
        max_top = self.engine.config.limits.max_logprobs
        if not 0 <= top <= max_top:
            raise RequestError(f"got top={top}; allowed are 0 to {max_top}; change it", field="top")
        token_request = await self._token_request(replace(request, params=score_params(top)))
        stream = self.engine.submit(token_request)
        with self._owned(stream, request.tenant):
            return await scores_of(self.engine, stream, token_request.prompt_ids)

    def abort(self, request_id: str, tenant: str) -> bool:
        """Ends a request of the tenant's own; False where none of that name is in flight."""
        return self._owners.get(request_id) == tenant and self.engine.abort(request_id)

    def check_model(self, model: str) -> None:
        """Raises RequestError NOT_FOUND where `model` is neither empty nor the served one."""
        if model and model != self.model_name:
            raise RequestError(
                f"got model {model[:80]!r}; served is {self.model_name!r}; name that or none",
                code=ErrorCode.NOT_FOUND,
                field="model",
            )

    async def _token_request(self, request: TextRequest) -> Request:
        self.check_model(request.model)
        encoder, params = self.encoder, request.params
        encoder.check_stop(request.stop)
        if request.bad_words:
            # Each is two sequences: at the start of a text, and after a space.
            max_words = self.engine.config.limits.max_bad_words // 2
            sequences = encoder.bad_word_ids(request.bad_words, max_words)
            params = replace(params, bad_words=params.bad_words + sequences)
        return Request(
            prompt_ids=await encoder.encode(request.prompt),
            params=params,
            request_id=request.request_id,
            priority=request.priority,
            timeout_s=request.timeout_s,
            tenant=request.tenant,
            adapter=request.adapter,
        )

    def _completion(self, request: TextRequest) -> Completion:
        prompt = request.prompt
        return Completion(
            Detokenizer(
                self.encoder.tokenizer,
                request.stop,
                request.params.include_stop,
                request.skips_special,
                # An answer is a text of its own, and so is what follows nothing.
                continues_text=prompt.messages is None and prompt.text != "",
            ),
            self._textless_ids,
        )

    def _lease_s(self, lease_s: float | None) -> float:
        longest = self.engine.config.max_lease_s
        if lease_s is None:
            return longest
        if not 0 < lease_s <= longest:
            raise RequestError(
                f"got lease_s={lease_s}; allowed are over 0 to {longest}; change it",
                field="lease_s",
            )
        return lease_s

    def _text_stream(
        self, stream: TokenStream, completions: list[Completion], tenant: str
    ) -> TextStream:
        request_id = stream.request_id
        self._owners[request_id] = tenant
        return TextStream(
            self.engine, stream, completions, lambda: self._owners.pop(request_id, None)
        )

    @contextmanager
    def _owned(self, stream: TokenStream, tenant: str) -> Iterator[None]:
        """Lets the tenant abort the stream's request meanwhile."""
        self._owners[stream.request_id] = tenant
        try:
            yield
        finally:
            self._owners.pop(stream.request_id, None)

    def _hold(self, handle: KvHandle, completion: Completion) -> None:
        now = time.monotonic()
        for handle_id in [key for key, held in self._held.items() if held.expires_at < now]:
            del self._held[handle_id]
        self._held[handle.handle_id] = _Held(
            completion=completion, expires_at=now + handle.expires_in_s + _HELD_SLACK_S
        )

    def _reap(self, stream: TokenStream, tenant: str) -> None:
        """Gives back the pages of a prefill whose caller has gone, should it be too late for the
        abort to do so. It runs beside the cancelled call, so that nothing cancels it."""

        async def reap() -> None:
            async for _ in stream:
                pass
            if stream.handle is not None:
                with suppress(RequestError):  # its lease has ended meanwhile
                    self.engine.release(stream.handle.handle_id, stream.handle.epoch, tenant)

        task = asyncio.get_running_loop().create_task(reap())
        self._reapers.add(task)
        task.add_done_callback(self._reapers.discard)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """The text of a completion whose pages are leased."""

    completion: Completion
    expires_at: float
