"""From a plan to the words that the step reads. Host arrays only."""

import numpy as np

from pallasite.engine.config import Limits
from pallasite.engine.layout import SAMPLING_FIELDS, Bucket, Layout
from pallasite.engine.plan import Part, Plan, Row
from pallasite.engine.request import SamplingParams
from pallasite.engine.sampler_state import has_bias
from pallasite.engine.sequence import Sequence


class BatchBuilder:
    """Keeps what a slot's sequence needs in every step, and fills in the rest step by step.

    `num_slots` are those of each shard.
    """

    def __init__(self, layouts: dict[Bucket, Layout], num_shards: int, num_slots: int) -> None:
        pages_per_request = next(iter(layouts.values())).pages_per_request
        self._layouts = layouts
        self._sampling: dict[str, np.ndarray] = {
            name: np.zeros((num_shards, num_slots), dtype)
            for name, dtype in SAMPLING_FIELDS.items()
        }
        self._page_table = np.zeros((num_shards, num_slots, pages_per_request), np.int32)
        self._num_pages = np.zeros((num_shards, num_slots), np.int32)
        self._adapter_slot = np.full((num_shards, num_slots), -1, np.int32)

    def admit(self, sequence: Sequence) -> None:
        """Notes what is constant about a sequence that was just given its slot."""
        place, params = (sequence.shard, sequence.slot), sequence.request.params
        for name in SAMPLING_FIELDS.keys() - {"seed", "has_bias", "num_logprobs"}:
            self._sampling[name][place] = getattr(params, name)
        self._sampling["seed"][place] = np.uint32(sequence.seed).view(np.int32)
        self._sampling["has_bias"][place] = has_bias(params)
        self._sampling["num_logprobs"][place] = -1 if params.logprobs is None else params.logprobs
        self._adapter_slot[place] = sequence.adapter_slot
        self._num_pages[place] = 0

    def build(self, plan: Plan, bucket: Bucket, eos_token_ids: tuple[int, ...]) -> np.ndarray:
        """Returns the words [shards, W] of a step that runs `plan`; nothing writes to them later.

        Each shard's are a batch of its own, of its own slots and pages, and may have no rows.
        """
        layout = self._layouts[bucket]
        words = np.zeros((len(plan.parts), layout.num_words), np.int32)
        for shard, part in enumerate(plan.parts):
            views = layout.views(words[shard])
            views["num_steps"][...] = plan.num_steps
            self._fill(views, shard, part, eos_token_ids)
        return words

    def _fill(
        self,
        views: dict[str, np.ndarray],
        shard: int,
        part: Part,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        slots = np.array([row.slot for row in part.rows], np.int32)
        count = len(part.rows)
        start = 0
        for index, row in enumerate(part.rows):
            self._fill_tokens(views, row, start)
            self._note_pages(row)
            views["query_starts"][index] = start
            views["kv_lens"][index] = row.start + row.num_tokens
            views["takes_previous"][index] = row.takes_previous
            views["samples"][index] = row.samples
            views["output_index"][index] = row.start + row.num_tokens - row.sequence.num_prompt
            start += row.num_tokens
        views["query_starts"][count:] = start
        views["slot"][:count] = slots
        views["adapter_slot"][:count] = self._adapter_slot[shard, slots]
        views["adapter_slot"][count:] = -1
        views["page_table"][:count] = self._page_table[shard, slots]
        for name, values in self._sampling.items():
            views[name][:count] = values[shard, slots]
        views["num_logprobs"][count:] = -1
        views["num_requests"][...] = count
        views["num_decode"][...] = part.num_decode
        views["bans"].fill(-1)
        verifies = len(views["bans"]) > len(views["slot"])
        for index, row in enumerate(part.rows):
            if not row.samples or not _may_ban(row.sequence.request.params):
                continue
            place = views["query_starts"][index] if verifies else index
            for num_drafts in range(len(row.draft) + 1):
                if pairs := bans(row, eos_token_ids, num_drafts):
                    views["bans"][place + num_drafts, : len(pairs)] = pairs

    def _fill_tokens(self, views: dict[str, np.ndarray], row: Row, start: int) -> None:
        end = start + row.num_tokens
        stop = row.start + row.num_tokens
        draft_start = end - len(row.draft)
        if not row.takes_previous:
            known = row.sequence.token_ids[row.start : row.certain_end]
            views["token_ids"][start:draft_start] = known
        views["token_ids"][draft_start:end] = row.draft
        views["positions"][start:end] = np.arange(row.start, stop, dtype=np.int32)
        if row.sequence.needs_scores:
            prompt = row.sequence.request.prompt_ids[row.start + 1 : stop + 1]
            views["targets"][start : start + len(prompt)] = prompt
            views["wants_scores"][...] = 1

    def _note_pages(self, row: Row) -> None:
        place, pages = (row.sequence.shard, row.slot), row.sequence.pages
        known = self._num_pages[place]
        if known < len(pages):
            self._page_table[place][known : len(pages)] = pages[known:]
            # A draft's pages may go back, one a token at most, and others come in their place.
            self._num_pages[place] = max(0, len(pages) - len(row.draft))


def bans(row: Row, eos_token_ids: tuple[int, ...], num_drafts: int = 0) -> list[tuple[int, int]]:
    """Returns the pairs (if_token, banned) of what is sampled after num_drafts drafted tokens.

    Where the token fed is the slot's own last sample, the host may not know it yet: the pair then
    leaves the comparison with it to the device.
    """
    params = row.sequence.request.params
    end = row.certain_end + num_drafts
    is_open = row.takes_previous and not num_drafts
    pairs = []
    if end - row.sequence.num_prompt < params.min_tokens:
        pairs += [(-1, token_id) for token_id in {*eos_token_ids, *params.stop_token_ids}]
    longest = max((len(word) for word in params.bad_words), default=0)
    known_end = row.start if is_open else row.certain_end
    known = (
        *row.sequence.token_ids[max(0, known_end - longest) : known_end],
        *row.draft[:num_drafts],
    )
    for word in params.bad_words:
        prefix, last = word[:-1], word[-1]
        if not prefix:
            pairs.append((-1, last))
        elif is_open:
            if _ends_with(known, prefix[:-1]):
                pairs.append((prefix[-1], last))
        elif _ends_with(known, prefix):
            pairs.append((-1, last))
    return pairs


def max_bans(limits: Limits, num_eos: int) -> int:
    """Returns the most pairs that `bans` can give."""
    return limits.max_bad_words + limits.max_stop_token_ids + num_eos


def _may_ban(params: SamplingParams) -> bool:
    return params.min_tokens > 0 or bool(params.bad_words)


def _ends_with(token_ids: tuple[int, ...], suffix: tuple[int, ...]) -> bool:
    return not suffix or token_ids[-len(suffix) :] == suffix
