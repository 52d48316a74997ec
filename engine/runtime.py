"""One model on its devices: weights, cache, sampler state and the programs that run them."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from pallasite.engine.batch_builder import max_bans
from pallasite.engine.config import EngineConfig
from pallasite.engine.layout import Bucket, Layout
from pallasite.engine.planner import (
    MemoryPlan,
    choose_num_pages,
    default_cpu_pages,
    memory_limit,
    pages_that_fit,
)
from pallasite.engine.programs import Programs, ProgramSpec, bucket_ladder, use_compile_cache
from pallasite.engine.sampler_state import SamplerState, SlotEdit, init_state
from pallasite.engine.scheduler import Plan
from pallasite.models.checkpoint import Checkpoint, open_checkpoint
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.errors import ConfigError
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.loader import check_tensors, load_weights
from pallasite.models.pull import locate
from pallasite.models.registry import make_model
from pallasite.models.sharding import make_mesh, replicated
from pallasite.models.weights import compute_dtype, named_weights, num_bytes, placed
from pallasite.pallas_kernels.target import TARGETS, Target

Progress = Callable[[str], None]


class Runtime:
    """What the engine's loop drives. Its methods are called from that loop alone.

    Attributes:
        max_context_len: tokens of one sequence at most.
    """

    def __init__(
        self, programs: Programs, spec: ProgramSpec, cache_spec: CacheSpec, max_context_len: int
    ) -> None:
        self.programs = programs
        self.cache_spec = cache_spec
        self.max_context_len = max_context_len
        self.layouts = spec.layouts
        self._spec = spec
        self._weights: list[jax.Array] = jax.tree.leaves(spec.model)
        self._cache: jax.Array | None = None
        self._state: SamplerState | None = None
        self.reset()
        programs.seal()

    @property
    def model_config(self) -> ModelConfig:
        return self.cache_spec.model

    @property
    def page_size(self) -> int:
        return self.cache_spec.target.page_size

    def reset(self) -> None:
        """Makes the cache and the sampler state anew, empty."""
        self._cache = self._state = None  # the old ones go first: both would not fit
        self._cache = self.cache_spec.allocate(self._spec.mesh)
        self._state = _allocate_state(self._spec.state)

    def bucket_for(self, plan: Plan) -> Bucket:
        """Returns the smallest bucket that takes a plan. Raises LookupError, counted, for none."""
        num_rows, num_tokens = len(plan.rows), plan.num_tokens
        has_prefill = plan.num_decode < num_rows
        for bucket in self.programs.buckets:
            fits = num_tokens <= bucket.num_tokens and num_rows <= bucket.num_rows
            if fits and bucket.has_prefill == has_prefill:
                return bucket
        wanted = Bucket(num_tokens=num_tokens, num_rows=num_rows)
        self.programs.step(wanted)
        return wanted

    def edit(self, edit: SlotEdit) -> None:
        """Prepares a slot for a sequence."""
        assert self._state is not None
        self._state = self.programs.edit(self._state, edit)

    def run(self, bucket: Bucket, words: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Launches a step; returns its results and its prompt scores, still on the device."""
        assert self._cache is not None
        assert self._state is not None
        step = self.programs.step(bucket)
        self._cache, self._state, results, scores = step(
            self._weights, self._cache, self._state, words
        )
        return results, scores


def load_runtime(model: Path | str, config: EngineConfig, progress: Progress) -> Runtime:
    """Opens, plans, compiles and loads; see `Engine.load`."""
    start = time.monotonic()
    if config.compile_cache is not None:
        use_compile_cache(config.compile_cache)
    device = jax.devices()[0]
    target, mesh = TARGETS[device.platform], make_mesh([device])
    limit = memory_limit(device)
    checkpoint = open_checkpoint(locate(str(model)))
    abstract = placed(make_model(checkpoint.config, config.weights, target), mesh)
    check_tensors([weight for _, weight in named_weights(abstract)], checkpoint)

    max_context_len = _context_len(config, checkpoint.config)
    cache_spec = _cache_spec(config, checkpoint.config, target, max_context_len)
    if cache_spec.num_pages == 0:
        probe = _program_spec(config, abstract, replace(cache_spec, num_pages=1), mesh)
        largest = max(probe.layouts)
        probe = replace(probe, layouts={largest: probe.layouts[largest]})
        progress("compiling the largest program, to see how much memory is left for the cache")
        programs = Programs(probe)
        programs.compile(progress)
        programs.close()
        plan = _memory_plan(probe, cache_spec, programs.temporary_bytes(), limit)
        cache_spec = replace(cache_spec, num_pages=pages_that_fit(plan, cache_spec))

    opened = time.monotonic()
    spec = _program_spec(config, abstract, cache_spec, mesh)
    programs = Programs(spec)
    # What the shapes alone need is known now; the programs' temporaries once they are compiled.
    _memory_plan(spec, cache_spec, 0, limit).check()
    with ThreadPoolExecutor(1) as background:
        loading = background.submit(_load, abstract, checkpoint, mesh, progress)
        programs.compile(progress)
        compiled = time.monotonic()
        loaded = loading.result()
    _memory_plan(spec, cache_spec, programs.temporary_bytes(), limit).check()
    _return_freed_memory()
    prepared = time.monotonic()
    runtime = Runtime(programs, replace(spec, model=loaded), cache_spec, max_context_len)
    end = time.monotonic()
    progress(
        f"ready after {end - start:.1f} s: opened and planned {opened - start:.1f} s, compiled"
        f" {compiled - opened:.1f} s while loading, loaded {prepared - compiled:.1f} s more,"
        f" allocated {end - prepared:.1f} s"
    )
    return runtime


def _return_freed_memory() -> None:
    """Gives back what tracing, compiling and loading left behind: hundreds of megabytes.

    The C library keeps freed memory for itself unless it is told to return it; only glibc can be.
    """
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _load(abstract: Decoder, checkpoint: Checkpoint, mesh: Mesh, progress: Progress) -> Decoder:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1.0 or done == total:
            last = now
            progress(f"loaded {done} of {total} tensors, {now - start:.1f} s")

    return load_weights(abstract, checkpoint, mesh, show)


def _context_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_context_len
    if wanted is not None and wanted > model.context_len:
        raise ConfigError(
            f"got max_context_len={wanted}; this model was made for {model.context_len} tokens at"
            " most; lower it"
        )
    return model.context_len if wanted is None else wanted


def _cache_spec(
    config: EngineConfig, model: ModelConfig, target: Target, max_context_len: int
) -> CacheSpec:
    """Returns the cache's shape; with no pages where it is to take what fits."""
    num_pages = choose_num_pages(config, target.page_size)
    if num_pages is None:
        is_cpu = target.platform == "cpu"
        num_pages = default_cpu_pages(config, target.page_size, max_context_len) if is_cpu else 0
    return CacheSpec(
        model=model, target=target, dtype=compute_dtype(config.weights), num_pages=num_pages
    )


def _program_spec(
    config: EngineConfig, model: Decoder, cache_spec: CacheSpec, mesh: Mesh
) -> ProgramSpec:
    max_context_len = _context_len(config, cache_spec.model)
    pages_per_request = -(-max_context_len // cache_spec.target.page_size)
    num_eos = len(cache_spec.model.eos_token_ids)
    buckets = bucket_ladder(
        config.max_requests, config.max_batch_tokens, cache_spec.target.pads_rows_to
    )
    layouts = {
        bucket: Layout(
            bucket=bucket,
            pages_per_request=pages_per_request,
            num_bans=max_bans(config.limits, num_eos),
        )
        for bucket in buckets
    }
    state = jax.eval_shape(lambda: init_state(config.max_requests, cache_spec.model.vocab_size))
    everywhere = replicated(mesh)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state
    )
    return ProgramSpec(
        model=model, cache=cache_spec.abstract(mesh), state=state, layouts=layouts, mesh=mesh
    )


def _memory_plan(
    spec: ProgramSpec, cache_spec: CacheSpec, temporaries: int, limit: int | None
) -> MemoryPlan:
    return MemoryPlan(
        weights=num_bytes(spec.model),
        cache=cache_spec.num_bytes,
        sampler=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(spec.state)),
        temporaries=temporaries,
        limit=limit,
    )


def _allocate_state(state: SamplerState) -> SamplerState:
    num_slots, vocab_size = state.counts.shape
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(init_state(num_slots, vocab_size), placement)
