"""Drives transformers on torch, which dequantizes the GGUF file when it reads it."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.driver import Note, Room, Score

DTYPE = torch.bfloat16
"""Faster than float32 at every point."""


class Transformers:
    """A model, and its own `generate`."""

    def __init__(self, room: Room) -> None:
        torch.set_num_threads(room.num_threads)
        torch.set_grad_enabled(False)
        path = Path(room.model)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=DTYPE
        ).eval()
        self.settings = {
            "dtype": str(DTYPE),
            "attention": self._model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "cache": "transformers' default (dynamic)",
            "compiled": False,
            "prefix cache": "none: each call makes a cache of its own",
        }
        self.versions = {
            name: importlib.metadata.version(name) for name in ("transformers", "torch", "gguf")
        }

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Has nothing to do: the cache grows as it is filled."""

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=output_len,
            eos_token_id=None,
            pad_token_id=0,
            streamer=_Notes(len(prompts), note),
        )

    def score(self, token_ids: Sequence[int]) -> Score:
        ids = torch.tensor([list(token_ids)])
        logits = self._model(input_ids=ids).logits[0, :-1].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        scored = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        return Score(logprobs=scored.tolist(), top=logits.argmax(dim=-1).tolist())


class _Notes(BaseStreamer):
    """Takes the prompts first, and then a token of each request a step."""

    def __init__(self, num_requests: int, note: Note) -> None:
        self._num_requests = num_requests
        self._note = note
        self._has_prompts = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompts:
            self._has_prompts = True
            return
        num_each = value.numel() // self._num_requests
        for index in range(self._num_requests):
            self._note(index, num_each)

    def end(self) -> None:
        """Has nothing to do."""


def load(room: Room) -> Transformers:
    return Transformers(room)
