"""From text and chats to token ids, within the limits of one request.

Runs in one event loop. Long texts are encoded on a worker thread, and a chat template always is.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pallasite.engine.errors import RequestError
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.config import TextLimits
from pallasite.server.text_request import Prompt
from pallasite.server.tokenizer import Tokenizer

_T = TypeVar("_T")

# Encoding this many characters takes about a millisecond, which other streams can wait.
_INLINE_TEXT_LEN = 2000


class PromptEncoder:
    """Encodes what requests carry as text. Every method raises RequestError for what is over the
    limits."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, limits: TextLimits
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._limits = limits
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="text")

    def close(self) -> None:
        """Lets the worker threads go."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt. Raises RequestError for one over the limits."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.messages is not None:
            return await self._encode_chat(prompt.messages, prompt.adds_generation_prompt)
        text = prompt.text or ""
        self._check_text_len("text", len(text))

        def encode_text() -> list[int]:
            return self.tokenizer.encode(text, adds_special_tokens=prompt.adds_special_tokens)

        is_short = len(text) <= _INLINE_TEXT_LEN
        return tuple(encode_text() if is_short else await self._on_worker(encode_text))

    async def decode(self, token_ids: tuple[int, ...], *, skips_special: bool) -> str:
        """The text of token ids. Raises RequestError for ids outside the vocabulary."""
        self._check_text_len("token_ids", len(token_ids))

        def decode_all() -> str:
            return self.tokenizer.decode(token_ids, skips_special=skips_special)

        is_short = len(token_ids) <= _INLINE_TEXT_LEN
        try:
            return decode_all() if is_short else await self._on_worker(decode_all)
        except ValueError as error:
            raise RequestError(str(error), field="token_ids") from error

    def textless_ids(self, vocab_size: int) -> frozenset[int]:
        """The ids of a model's vocabulary that the tokenizer has no text for: an embedding is often
        padded to a round number of rows."""

        def is_textless(token_id: int) -> bool:
            try:
                self.tokenizer.token_text(token_id)
            except ValueError:
                return True
            return False

        return frozenset(filter(is_textless, range(vocab_size)))

    def bad_word_ids(self, words: tuple[str, ...], max_words: int) -> tuple[tuple[int, ...], ...]:
        """The token sequences of words that may not be completed: each within a text, with no space
        in front and with one."""
        if len(words) > max_words:
            raise RequestError(
                f"got {len(words)} bad words; allowed are {max_words}; leave some out",
                field="sampling.bad_words",
            )
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            if not 0 < len(word) <= self._limits.max_bad_word_len:
                raise RequestError(
                    f"got a bad word of {len(word)} characters; allowed are 1 to"
                    f" {self._limits.max_bad_word_len}; change it",
                    field="sampling.bad_words",
                )
            for form in (word, " " + word):
                ids = self.tokenizer.encode_inside(form, field="sampling.bad_words")
                sequences[tuple(ids)] = None
        return tuple(sequences)

    def check_stop(self, stop: tuple[str, ...]) -> None:
        """Checks the stop texts of a request."""
        limits = self._limits
        if len(stop) > limits.max_stop:
            raise RequestError(
                f"got {len(stop)} stop texts; allowed are {limits.max_stop}; leave some out",
                field="sampling.stop",
            )
        for text in stop:
            if not 0 < len(text) <= limits.max_stop_len:
                raise RequestError(
                    f"got a stop text of {len(text)} characters; allowed are 1 to"
                    f" {limits.max_stop_len}; change it",
                    field="sampling.stop",
                )

    async def _encode_chat(
        self, messages: tuple[Mapping[str, str], ...], adds_generation_prompt: bool
    ) -> tuple[int, ...]:
        template = self.chat_template
        if template is None:
            raise RequestError(
                "got a chat; this model has no chat template; send text or token ids",
                field="messages",
            )
        if not 0 < len(messages) <= self._limits.max_messages:
            raise RequestError(
                f"got {len(messages)} messages; allowed are 1 to {self._limits.max_messages};"
                " change their number",
                field="messages",
            )
        total_len = sum(len(message["role"]) + len(message["content"]) for message in messages)
        self._check_text_len("messages", total_len)

        def encode_chat() -> list[int]:
            return template.encode(
                [dict(message) for message in messages],
                adds_generation_prompt=adds_generation_prompt,
            )

        return tuple(await self._on_worker(encode_chat))

    def _check_text_len(self, name: str, length: int) -> None:
        if length > self._limits.max_text_len:
            raise RequestError(
                f"got {name} of length {length}; allowed are {self._limits.max_text_len}; shorten"
                " it",
                field=name,
            )

    async def _on_worker(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)
