"""How a step's inputs lie in one array of 32-bit words, so that a step is one copy to the device.

The host writes through numpy views; the program reads the same fields off the traced array.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallasite.engine.sampler import SamplingRows
from pallasite.pallas_kernels.paged_attention import Ragged


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """The static shape of a step: T tokens for B rows. Where they are equal, all rows decode.

    Attributes:
        num_drafts: K, the drafted tokens of a row at most, in a step that verifies some: it samples
            after every token. 0 in other steps, which sample after each row's last token.
        max_steps: S, the steps that one run of a decode program makes at most, each of them from
            what the one before it sampled.
    """

    num_tokens: int
    num_rows: int
    num_drafts: int = 0
    max_steps: int = 1

    @property
    def has_prefill(self) -> bool:
        return self.num_tokens > self.num_rows and not self.num_drafts

    @property
    def num_sampled(self) -> int:
        """Places that the step samples at, in use or not."""
        return self.num_tokens if self.num_drafts else self.num_rows

    def __str__(self) -> str:
        kind = "verify" if self.num_drafts else "mixed" if self.has_prefill else "decode"
        return f"{kind} of {self.num_tokens} tokens"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """A step's inputs as the program sees them.

    Attributes:
        adapter_slots: each row's adapter, -1 for none.
        takes_previous: rows whose first token is their slot's last sample; its id here is 0. They
            have no other but drafted ones.
        samples: rows that sample a token.
        rows: how; last_token is not known before the previous samples are taken. Where drafts are
            verified, bans are [T, W, 2], each token's own.
        targets: in mixed steps, the prompt token that follows each token.
        wants_scores: whether any row's prompt is scored.
        num_steps: how many steps are made; more than one where all rows decode and sample.
    """

    token_ids: Int[Array, "T"]
    ragged: Ragged
    adapter_slots: Int[Array, "B"]
    takes_previous: Bool[Array, "B"]
    samples: Bool[Array, "B"]
    rows: SamplingRows
    targets: Int[Array, "T"]
    wants_scores: Bool[Array, ""]
    num_steps: Int[Array, ""]

    def later(self, num_steps: Int[Array, ""]) -> "StepInputs":
        """Returns those of a step further on, whose rows go on from what they sampled; traced."""
        more = jnp.where(self.samples, num_steps, 0)
        ragged = replace(
            self.ragged, positions=self.ragged.positions + more, kv_lens=self.ragged.kv_lens + more
        )
        return replace(
            self,
            ragged=ragged,
            takes_previous=jnp.where(num_steps > 0, self.samples, self.takes_previous),
            rows=replace(self.rows, output_index=self.rows.output_index + more),
        )


SAMPLING_FIELDS: dict[str, type] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "seed": np.int32,
    "has_bias": np.int32,
    "num_logprobs": np.int32,
}
"""The fields of `SamplingRows` that stay the same while a sequence runs."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each field of a bucket's inputs lies.

    Attributes:
        pages_per_request: M, the columns of the page table.
        num_bans: W, the pairs of `SamplingRows.bans` in each row.
    """

    bucket: Bucket
    pages_per_request: int
    num_bans: int

    @property
    def num_words(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self._fields())

    def views(self, words: np.ndarray) -> dict[str, np.ndarray]:
        """Returns each field as a view of the words, in its shape and dtype."""
        views: dict[str, np.ndarray] = {}
        offset = 0
        for name, shape, dtype in self._fields():
            end = offset + math.prod(shape)
            views[name] = words[offset:end].view(dtype).reshape(shape)
            offset = end
        return views

    def unpack(self, words: Int[Array, "W"]) -> StepInputs:
        """Returns the inputs that the words hold; traced."""
        fields: dict[str, Any] = {}
        offset = 0
        for name, shape, dtype in self._fields():
            end = offset + math.prod(shape)
            field = words[offset:end].reshape(shape)
            if dtype is np.float32:
                field = jax.lax.bitcast_convert_type(field, jnp.float32)
            fields[name] = field
            offset = end
        ragged = Ragged(
            positions=fields["positions"],
            query_starts=fields["query_starts"],
            kv_lens=fields["kv_lens"],
            page_table=fields["page_table"],
            num_requests=fields["num_requests"],
            num_decode=fields["num_decode"],
        )
        sampling = {name: fields[name] for name in SAMPLING_FIELDS}
        sampling["has_bias"] = sampling["has_bias"] != 0
        rows = SamplingRows(
            **sampling,
            output_index=fields["output_index"],
            slot=fields["slot"],
            bans=fields["bans"],
            last_token=jnp.zeros_like(fields["slot"]),
            drafts=jnp.zeros((self.bucket.num_rows, 0), jnp.int32),
        )
        return StepInputs(
            token_ids=fields["token_ids"],
            ragged=ragged,
            adapter_slots=fields["adapter_slot"],
            takes_previous=fields["takes_previous"] != 0,
            samples=fields["samples"] != 0,
            rows=rows,
            targets=fields["targets"],
            wants_scores=fields["wants_scores"] != 0,
            num_steps=fields["num_steps"],
        )

    def _fields(self) -> Iterator[tuple[str, tuple[int, ...], type]]:
        T, B = self.bucket.num_tokens, self.bucket.num_rows
        yield "token_ids", (T,), np.int32
        yield "positions", (T,), np.int32
        yield "targets", (T,), np.int32
        yield "query_starts", (B + 1,), np.int32
        yield "kv_lens", (B,), np.int32
        yield "page_table", (B, self.pages_per_request), np.int32
        yield "takes_previous", (B,), np.int32
        yield "samples", (B,), np.int32
        yield "slot", (B,), np.int32
        yield "adapter_slot", (B,), np.int32
        yield "output_index", (B,), np.int32
        yield "bans", (self.bucket.num_sampled, self.num_bans, 2), np.int32
        for name, dtype in SAMPLING_FIELDS.items():
            yield name, (B,), dtype
        for name in ("num_requests", "num_decode", "wants_scores", "num_steps"):
            yield name, (), np.int32
