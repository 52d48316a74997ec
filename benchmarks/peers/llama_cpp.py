"""Drives llama.cpp by the C functions that llama-cpp-python binds.

Its class `Llama` completes one request at a time. These functions take tokens of many sequences in
a call, as llama.cpp's own server calls them.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np

from benchmarks.peers.driver import Note, Room, Score

BATCH_TOKENS = 2048
"""Tokens of a call at most: llama.cpp's default."""

PAD = 256
"""A sequence's cache is a multiple of so many tokens."""


class LlamaCpp:
    """A model, and a context made for the requests that come next."""

    def __init__(self, room: Room) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            room.model.encode(), llama_cpp.llama_model_default_params()
        )
        if model is None:
            raise ValueError("llama.cpp cannot load the file")
        self._model = model
        vocab = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._num_threads = room.num_threads
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: llama_cpp.llama_context_p | None = None
        self._shape = (0, 0)
        self.settings = {
            "n_threads": room.num_threads,
            "n_threads_batch": room.num_threads,
            "n_batch": BATCH_TOKENS,
            "kv_unified": False,
            "others": "llama.cpp's defaults (flash attention: auto, cache: f16)",
            "system": llama_cpp.llama_print_system_info().decode(),
            "prefix cache": "none: the cache is cleared before each call",
        }
        self.versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Makes a context with a part of the cache for each request."""
        shape = (num_requests, -(-request_len // PAD) * PAD)
        if shape == self._shape:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = shape[0] * shape[1]
        params.n_seq_max = shape[0]
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._num_threads
        # Each sequence then reads its own part of the cache alone.
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise ValueError(f"llama.cpp cannot make a context of {shape}")
        self._shape = shape

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        self._clear()
        last = [0] * len(prompts)
        for calls in _packed(prompts):
            ends = [len(prompts[sequence]) - 1 == position for sequence, position in calls]
            tokens = [prompts[sequence][position] for sequence, position in calls]
            self._decode(tokens, calls, ends)
            for place, (sequence, _) in enumerate(calls):
                if ends[place]:
                    last[sequence] = int(self._logits(place).argmax())
                    note(sequence, 1)
        for step in range(output_len - 1):
            places = [(index, len(prompt) + step) for index, prompt in enumerate(prompts)]
            self._decode(last, places, [True] * len(prompts))
            for index in range(len(prompts)):
                last[index] = int(self._logits(index).argmax())
            for index in range(len(prompts)):
                note(index, 1)

    def score(self, token_ids: Sequence[int]) -> Score:
        self.prepare(1, len(token_ids))
        self._clear()
        places = [(0, position) for position in range(len(token_ids))]
        self._decode(token_ids, places, [True] * len(token_ids))
        logprobs, top = [], []
        for position, token_id in enumerate(token_ids[1:]):
            x = self._logits(position).astype(np.float64)
            peak = x.max()
            logprobs.append(float(x[token_id] - peak - np.log(np.exp(x - peak).sum())))
            top.append(int(x.argmax()))
        return Score(logprobs=logprobs, top=top)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def _decode(
        self, tokens: Sequence[int], places: Sequence[tuple[int, int]], wanted: Sequence[bool]
    ) -> None:
        """Runs tokens at (sequence, position) and keeps the logits of those that are wanted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (sequence, position) in enumerate(places):
            batch.token[index] = tokens[index]
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted[index]
        if status := llama_cpp.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode returned {status}")

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))


def _packed(prompts: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, int]]]:
    """Yields (sequence, position) of all tokens, as many at once as a call takes."""
    places = [(index, at) for index, prompt in enumerate(prompts) for at in range(len(prompt))]
    for start in range(0, len(places), BATCH_TOKENS):
        yield places[start : start + BATCH_TOKENS]


def load(room: Room) -> LlamaCpp:
    return LlamaCpp(room)
