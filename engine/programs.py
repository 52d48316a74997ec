"""The table of compiled programs: everything is compiled before the first request, or never.

A bucket that the table lacks, and any compilation in this process after `seal`, is counted.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from pallasite.engine.layout import Bucket, Layout
from pallasite.engine.sampler_state import SamplerState, SlotEdit, edit_slot
from pallasite.engine.step import make_step
from pallasite.models.adapters import AdapterSpec, set_slot
from pallasite.models.decoder import Decoder
from pallasite.models.lora import Adapters
from pallasite.models.sharding import DATA_AXIS, replicated
from pallasite.pallas_kernels.paged_attention import PagedCache

EDIT_TOKENS = 1024
"""Tokens of one edit of a slot; a longer prompt takes several."""

VERIFIED_A_ROW = 4
"""Tokens a row that the largest verify step has, where all rows run: each of them has logits."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """What all programs have in common: abstract weights, cache and sampler state on their mesh."""

    model: Decoder
    adapters: AdapterSpec
    cache: PagedCache
    state: SamplerState
    layouts: dict[Bucket, Layout]
    mesh: Mesh


class Programs:
    """Compiled steps by bucket, and the program that edits a slot.

    Attributes:
        misses: buckets that were asked for and that the table does not have.
    """

    def __init__(self, spec: ProgramSpec) -> None:
        self.misses = 0
        self._spec = spec
        self._steps: dict[Bucket, jax.stages.Compiled] = {}
        self._edit: jax.stages.Compiled | None = None
        self._set_slot: jax.stages.Compiled | None = None
        self._is_sealed = False
        self._compilations = 0
        self._is_counting = True
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def compilations(self) -> int:
        """Programs that this process compiled or loaded from the compile cache since `seal`."""
        return self._compilations

    @property
    def buckets(self) -> list[Bucket]:
        return sorted(self._spec.layouts)

    def compile(self, progress: Callable[[str], None], num_threads: int = 2) -> None:
        """Compiles every program, `num_threads` at a time."""
        start = time.monotonic()
        has_adapters = self._spec.adapters.num_slots > 0
        total = len(self._spec.layouts) + 1 + has_adapters
        with ThreadPoolExecutor(num_threads) as pool:
            edit = pool.submit(self._compile_edit)
            set_slot = pool.submit(self._compile_set_slot) if has_adapters else None
            # The largest first: they take longest.
            steps = {
                bucket: pool.submit(self._compile_step, bucket) for bucket in reversed(self.buckets)
            }
            for done, (bucket, future) in enumerate(steps.items(), start=1):
                self._steps[bucket] = future.result()
                seconds = time.monotonic() - start
                progress(f"compiled program {done} of {total} ({bucket}), {seconds:.1f} s")
            self._edit = edit.result()
            self._set_slot = None if set_slot is None else set_slot.result()

    def serialized(self) -> list[bytes]:
        """Returns the programs for `take`. All must have been compiled in this process."""
        assert self._edit is not None, "compile() comes first"
        programs = [self._edit, *(self._steps[bucket] for bucket in self.buckets)]
        programs += [] if self._set_slot is None else [self._set_slot]
        return [serialize_executable.serialize(program)[0] for program in programs]

    def take(self, serialized: Sequence[bytes | memoryview], num_threads: int = 2) -> None:
        """Takes over what another `Programs` of the same spec has serialized.

        JAX reads machine code and a pickle from these bytes: they are to be trusted as code is.
        Raises jax.errors.JaxRuntimeError where they are not this JAX's.
        """
        spec = self._spec
        weights = jax.tree.leaves(spec.model)
        # The inputs' and outputs' trees, as `lower` below has them.
        adapters = spec.adapters.abstract(spec.mesh)
        edits = (spec.state, self._abstract_edit(), self._abstract_index())
        trees: list[tuple[Any, Any]] = [(edits, spec.state)]
        for bucket in self.buckets:
            inputs = (weights, adapters, spec.cache, spec.state, self._words(bucket))
            trees.append((inputs, (spec.cache, spec.state, 0, 0)))
        if spec.adapters.num_slots:
            one = spec.adapters.abstract_one(spec.mesh)
            trees.append(((adapters, one, self._abstract_index()), adapters))
        devices = list(spec.mesh.devices.flat)

        def load(content: bytes | memoryview, tree: tuple[Any, Any]) -> jax.stages.Compiled:
            inputs, outputs = jax.tree.structure((tree[0], {})), jax.tree.structure(tree[1])
            return serialize_executable.deserialize_and_load(
                bytes(content), inputs, outputs, execution_devices=devices
            )

        assert len(serialized) == len(trees)
        with ThreadPoolExecutor(num_threads) as pool:
            self._edit, *others = pool.map(load, serialized, trees)
        self._set_slot = others.pop() if spec.adapters.num_slots else None
        self._steps = dict(zip(self.buckets, others, strict=True))

    def seal(self) -> None:
        """Ends compilation."""
        self._is_sealed = True

    def close(self) -> None:
        """Stops counting; a second call does nothing."""
        if self._is_counting:
            self._is_counting = False
            jax.monitoring.unregister_event_duration_listener(self._on_event)

    def step(self, bucket: Bucket) -> jax.stages.Compiled:
        """Returns a bucket's program. Raises LookupError, and counts, where there is none."""
        try:
            return self._steps[bucket]
        except KeyError:
            self.misses += 1
            raise LookupError(f"no program was compiled for a {bucket}") from None

    def edit(self, state: SamplerState, edit: SlotEdit, shard: int) -> SamplerState:
        """Applies an edit to a data shard's slot in the donated state."""
        assert self._edit is not None, "compile() comes first"
        return self._edit(state, edit, np.int32(shard))

    def set_adapter(self, adapters: Adapters, one: Adapters, slot: int) -> Adapters:
        """Puts one adapter into a slot of the donated arrays."""
        assert self._set_slot is not None, "compile() comes first, with room for adapters"
        return self._set_slot(adapters, one, np.int32(slot))

    def temporary_bytes(self) -> int:
        """Returns the most memory that any program needs beside its arguments."""
        others = [program for program in (self._set_slot,) if program is not None]
        return max(_temporary_bytes(program) for program in (*self._steps.values(), *others))

    def aliased_bytes(self, bucket: Bucket) -> int:
        """Returns the bytes of arguments that a program updates in place, on a device."""
        analysis = self._steps[bucket].memory_analysis()
        return 0 if analysis is None else analysis.alias_size_in_bytes

    def _compile_step(self, bucket: Bucket) -> jax.stages.Compiled:
        spec, layout = self._spec, self._spec.layouts[bucket]
        weights, structure = jax.tree.flatten(spec.model)
        adapters = spec.adapters.abstract(spec.mesh)
        inputs = (weights, adapters, spec.cache, spec.state, self._words(bucket))
        by_shard = PartitionSpec(DATA_AXIS)
        step = jax.shard_map(
            make_step(structure, layout),
            mesh=spec.mesh,
            in_specs=_specs(inputs),
            out_specs=(*_specs((spec.cache, spec.state)), by_shard, by_shard),
            check_vma=False,  # what the model axis's devices return of a shard is the same
        )
        return jax.jit(step, donate_argnums=(2, 3)).lower(*inputs).compile()

    def _compile_edit(self) -> jax.stages.Compiled:
        spec = self._spec
        inputs = (spec.state, self._abstract_edit(), self._abstract_index())

        def edit(state: SamplerState, edit: SlotEdit, shard: Int32[Array, ""]) -> SamplerState:
            is_here = jax.lax.axis_index(DATA_AXIS) == shard
            slot = jnp.where(is_here, edit.slot, state.last_token.shape[0])
            return edit_slot(state, replace(edit, slot=slot))

        program = jax.shard_map(
            edit,
            mesh=spec.mesh,
            in_specs=_specs(inputs),
            out_specs=_specs(spec.state),
            check_vma=False,
        )
        return jax.jit(program, donate_argnums=0).lower(*inputs).compile()

    def _compile_set_slot(self) -> jax.stages.Compiled:
        spec = self._spec
        adapters = spec.adapters.abstract(spec.mesh)
        inputs = (adapters, spec.adapters.abstract_one(spec.mesh), self._abstract_index())
        program = jax.shard_map(
            set_slot,
            mesh=spec.mesh,
            in_specs=_specs(inputs),
            out_specs=_specs(adapters),
            check_vma=False,
        )
        return jax.jit(program, donate_argnums=0).lower(*inputs).compile()

    def _words(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        shape = (self._spec.mesh.shape[DATA_AXIS], self._spec.layouts[bucket].num_words)
        by_shard = NamedSharding(self._spec.mesh, PartitionSpec(DATA_AXIS))
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=by_shard)

    def _abstract_index(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), np.int32, sharding=replicated(self._spec.mesh))

    def _abstract_edit(self) -> SlotEdit:
        everywhere = replicated(self._spec.mesh)

        def each(dtype: type) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((EDIT_TOKENS,), dtype, sharding=everywhere)

        def one(dtype: type) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((), dtype, sharding=everywhere)

        return SlotEdit(
            slot=one(np.int32),
            resets=one(np.bool_),
            bias_fill=one(np.float32),
            token_ids=each(np.int32),
            marks_seen=each(np.bool_),
            adds_count=each(np.int32),
            sets_bias=each(np.bool_),
            bias=each(np.float32),
        )

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT and self._is_sealed:
            self._compilations += 1


def use_compile_cache(folder: Path) -> None:
    """Makes JAX keep every compiled program in `folder`, for all of this process."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX decides once whether and where it keeps a cache; this process may have compiled already.
    compilation_cache.reset_cache()


def bucket_ladder(
    max_rows: int, max_tokens: int, least_rows: int, num_drafts: int = 0, max_steps: int = 1
) -> list[Bucket]:
    """Returns the buckets to compile: decode steps by rows, mixed and verify steps by tokens.

    Rows double from `least_rows` up to max_rows; tokens of mixed steps, whose rows are always
    max_rows, quadruple down from max_tokens, since padding a prefill costs less than a program.
    Tokens of verify steps, where there are num_drafts a row at most, double as rows do, up to
    VERIFIED_A_ROW a row. Programs of decode steps make `max_steps` at most in one run.
    """
    rows = []
    size = least_rows
    while size < max_rows:
        rows.append(size)
        size *= 2
    buckets = [
        Bucket(num_tokens=count, num_rows=count, max_steps=max_steps) for count in (*rows, max_rows)
    ]
    tokens = max_tokens
    while tokens > max_rows:
        buckets.append(Bucket(num_tokens=tokens, num_rows=max_rows))
        tokens = -(-tokens // 4)
        if tokens < 64:
            break
    if num_drafts:
        most_a_row = min(1 + num_drafts, VERIFIED_A_ROW)
        most = min(max(most_a_row * max_rows, 1 + num_drafts), max_tokens)
        size = 2 * least_rows
        tokens_of_verify = []
        while size < most:
            tokens_of_verify.append(size)
            size *= 2
        for count in (*tokens_of_verify, most):
            # One of the tokens is a drafted one.
            num_rows = min(count - 1, max_rows)
            buckets.append(Bucket(num_tokens=count, num_rows=num_rows, num_drafts=num_drafts))
    return sorted(buckets)


def _specs(tree: Any) -> Any:
    """Returns how `jax.shard_map` is to cut each array of a tree: as it is placed."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + outputs + analysis.generated_code_size_in_bytes
