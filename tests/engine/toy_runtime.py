"""A runtime of any number of data shards whose device is numpy and whose model is a checksum.

What a request is answered is a checksum of all tokens that its shard's pages hold for it, so that a
word, a page, a slot or a result that goes to the wrong row or shard gives another answer, and so
does what is read of a cache that was lost.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.layout import Layout
from pallasite.engine.programs import Programs, bucket_ladder
from pallasite.engine.request import Request
from pallasite.engine.runtime import Runtime
from pallasite.engine.sampler import NUM_TOP, OK
from pallasite.engine.step import RESULT_WIDTH
from tests.tiny_checkpoints import TINY

VOCAB = TINY.vocab_size
EOS = TINY.eos_token_ids[0]


def choose(token_ids: Sequence[int], bias: int, banned: set[int]) -> int:
    """The model: what follows these tokens."""
    words = np.asarray([*token_ids, bias], np.int32).tobytes()
    ranked = (zlib.crc32(words, attempt) % VOCAB for attempt in range(VOCAB))
    return next(token_id for token_id in ranked if token_id not in banned)


def score(token_ids: Sequence[int], target: int) -> float:
    """The model's log-probability of `target` after these tokens."""
    words = np.asarray([*token_ids, target], np.int32).tobytes()
    return -float(zlib.crc32(words) % 1000)


def answers(request: Request) -> tuple[int, ...]:
    """The completion of a request, with nothing in between: no batch, no pages, no shard."""
    params = request.params
    bias = sum(params.logit_bias)
    token_ids = list(request.prompt_ids)
    for number in range(params.max_tokens):
        banned = {word[-1] for word in params.bad_words if _ends_with(token_ids, word[:-1])}
        banned |= {EOS} if number < params.min_tokens else set()
        token_ids.append(choose(token_ids, bias, banned))
        if token_ids[-1] == EOS and not params.ignore_eos:
            del token_ids[-1]
            break
    return tuple(token_ids[len(request.prompt_ids) :])


class ToyRuntime(Runtime):
    """Runs the words of a step row by row. No program is compiled."""

    weight_forms = None

    def __init__(self, config: EngineConfig, num_shards: int, max_steps: int = 1) -> None:
        deployment = plan_deployment(TINY, config)
        spec = deployment.program_spec()
        [any_layout, *_] = spec.layouts.values()
        self.num_slots = config.max_requests // num_shards
        num_tokens = config.max_batch_tokens // num_shards
        buckets = bucket_ladder(self.num_slots, num_tokens, 1, max_steps=max_steps)
        self.layouts = {
            bucket: Layout(
                bucket=bucket,
                pages_per_request=any_layout.pages_per_request,
                num_bans=any_layout.num_bans,
            )
            for bucket in buckets
        }
        self.programs = Programs(replace(spec, layouts=self.layouts))
        self.cache_spec = deployment.cache_spec
        self.max_context_len = deployment.max_context_len
        self.num_rows: list[list[int]] = []
        self.num_steps: list[int] = []
        self.uses_all_cores = max_steps > 1
        self._num_shards = num_shards
        self.reset()

    @property
    def has_adapters(self) -> bool:
        return True

    @property
    def num_shards(self) -> int:
        return self._num_shards

    def reset(self):
        """Nothing of what was there is left."""
        num_pages = self.cache_spec.num_pages // self.num_shards
        self._tokens = np.full((self.num_shards, num_pages, self.page_size), -1, np.int32)
        self._last = np.full((self.num_shards, self.num_slots), -1, np.int32)
        self._bias = np.full((self.num_shards, self.num_slots), -1, np.int64)

    def edit(self, edit, shard):
        self._bias[shard, edit.slot] = edit.token_ids[edit.sets_bias].sum()

    def run(self, bucket, words):
        layout = self.layouts[bucket]
        assert words.shape == (self.num_shards, layout.num_words)
        shape = (self.num_shards, bucket.max_steps, bucket.num_rows, RESULT_WIDTH)
        results = np.zeros(shape, np.int32)
        scores = np.zeros((self.num_shards, bucket.num_tokens, RESULT_WIDTH), np.int32)
        for shard in range(self.num_shards):
            views = {name: view.copy() for name, view in layout.views(words[shard]).items()}
            for step in range(int(views["num_steps"])):
                if step:
                    _go_on(views)
                self._run_shard(shard, views, results[shard, step], scores[shard])
        [num_steps] = {int(layout.views(w)["num_steps"]) for w in words}
        self.num_steps.append(num_steps)
        self.num_rows.append([int(layout.views(w)["num_requests"]) for w in words])
        return jax.device_put(results), jax.device_put(scores)

    def _run_shard(self, shard, views, results, scores):
        count, starts = int(views["num_requests"]), views["query_starts"]
        lengths = np.diff(starts)
        assert (lengths[:count] > 0).all()
        assert (lengths[count:] == 0).all()
        assert (lengths[: int(views["num_decode"])] == 1).all(), "single tokens first"
        rows = [{name: v[row] for name, v in views.items() if v.ndim} for row in range(count)]
        spans = [slice(starts[row], starts[row + 1]) for row in range(count)]
        # As on a real device, all is written before anything is read: rows may share a prompt.
        for row, span in zip(rows, spans, strict=True):
            token_ids = views["token_ids"][span].copy()
            if row["takes_previous"]:
                [token_ids[0]] = self._last[shard, [row["slot"]]]
            positions = views["positions"][span]
            pages = row["page_table"][positions // self.page_size]
            self._tokens[shard, pages, positions % self.page_size] = token_ids
            assert positions[-1] + 1 == row["kv_lens"]
        for row, span, result in zip(rows, spans, results, strict=False):
            history = self._history(shard, row)
            if views["wants_scores"]:
                self._score(history, views, span, scores)
            if row["samples"]:
                bias = int(self._bias[shard, row["slot"]]) if row["has_bias"] else 0
                token_id = choose(history, bias, _banned(row["bans"], history[-1]))
                self._last[shard, row["slot"]] = token_id
                result[:3] = token_id, OK, _bits(score(history, token_id))

    def _score(self, history, views, span, scores):
        for place in range(span.start, span.stop):
            target = int(views["targets"][place])
            logprob = score(history[: views["positions"][place] + 1], target)
            scores[place, :3] = target, OK, _bits(logprob)
            scores[place, 3 : 3 + NUM_TOP] = -1

    def _history(self, shard, row):
        positions = np.arange(row["kv_lens"])
        pages = row["page_table"][positions // self.page_size]
        return self._tokens[shard, pages, positions % self.page_size].tolist()


def _go_on(views):
    """Makes of a step's inputs those of the next, of what this one sampled."""
    count = int(views["num_requests"])
    assert views["num_decode"] == count
    assert views["samples"][:count].all()
    for name in ("positions", "kv_lens", "output_index"):
        views[name][:count] += 1
    views["takes_previous"][:count] = True


def _bits(value):
    return np.float32(value).view(np.int32)


def _banned(bans, last):
    return {int(banned) for if_token, banned in bans if banned >= 0 and if_token in (-1, last)}


def _ends_with(token_ids, suffix):
    return not suffix or tuple(token_ids[-len(suffix) :]) == suffix
