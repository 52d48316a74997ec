"""Drives openvino-genai: its continuous batching, which reads the GGUF file itself."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.driver import Note, Room, Score

BATCH_TOKENS = 4096
"""Tokens of a step at most; 256, its default, was slower or no faster at every point."""

BLOCK = 32
"""Tokens of a block of its cache on a CPU."""


class OpenVino:
    """A pipeline that this process steps, so that each token's time is its step's end."""

    def __init__(self, room: Room) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = BATCH_TOKENS
        scheduler.max_num_seqs = room.max_requests
        scheduler.num_kv_blocks = room.max_requests + -(-room.num_tokens // BLOCK)
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_NUM_THREADS": room.num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_DIR": f"{room.folder}/compiled",
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            room.model, scheduler, "CPU", properties
        )
        self._num_requests = 0
        self.settings = {
            "scheduler": scheduler.to_string(),
            "properties": properties | {"CACHE_DIR": "its folder's"},
            "prefix cache": "off (enable_prefix_caching)",
        }
        self.versions = {
            name: importlib.metadata.version(name)
            for name in ("openvino-genai", "openvino", "openvino-tokenizers")
        }

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Has nothing to do: there is room since it was loaded."""

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        config = _config(output_len)
        handles = [self._add(prompt, config) for prompt in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    (output,) = handle.read().values()
                    note(index, len(output.generated_ids))

    def score(self, token_ids: Sequence[int]) -> Score:
        """Takes log-probabilities from an echo, which has no likeliest tokens.

        Those are the one token that follows each beginning of the text.
        """
        config = _config(1)
        config.echo = True
        config.logprobs = 1
        handle = self._add(token_ids, config)
        self._run()
        logprobs: list[float] = []
        for output in handle.read_all():
            logprobs += output.generated_log_probs
        # The first token's is a placeholder, and the last is the completion's.
        scored = logprobs[1 : len(token_ids)]
        tops = [self._add(token_ids[:end], _config(1)) for end in range(1, len(token_ids))]
        self._run()
        return Score(logprobs=scored, top=[_only(top) for top in tops])

    def _add(self, prompt: Sequence[int], config: openvino_genai.GenerationConfig) -> Any:
        self._num_requests += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._num_requests, ids, config)

    def _run(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def _only(handle: Any) -> int:
    (output,) = handle.read_all()
    return int(output.generated_ids[0])


def _config(output_len: int) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = output_len
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return config


def load(room: Room) -> OpenVino:
    return OpenVino(room)
