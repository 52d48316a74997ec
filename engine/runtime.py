"""One model on its devices: weights, cache, sampler state and the programs that run them."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from pallasite.engine.compile_process import compile_apart
from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import Deployment, devices_for, plan_deployment
from pallasite.engine.errors import adapter_memory_error, lost_adapters_error, placing_error
from pallasite.engine.host_memory import keep_freed_memory, return_freed_memory
from pallasite.engine.layout import Bucket
from pallasite.engine.plan import Plan
from pallasite.engine.planner import MemoryPlan, cache_limit, memory_limit, pages_that_fit
from pallasite.engine.program_file import ProgramFile
from pallasite.engine.programs import Programs, ProgramSpec, use_compile_cache
from pallasite.engine.sampler_state import SamplerState, SlotEdit, init_state
from pallasite.models.adapter_peft import PeftAdapter
from pallasite.models.adapters import HostLowRank, place_one
from pallasite.models.checkpoint import Checkpoint, open_checkpoint
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.loader import check_tensors, load_weights
from pallasite.models.lora import Adapters
from pallasite.models.pull import locate
from pallasite.models.registry import matrix_forms
from pallasite.models.sharding import DATA_AXIS
from pallasite.models.weights import holds_strips
from pallasite.pallas_kernels.paged_attention import PagedCache

Progress = Callable[[str], None]
HostAdapter = dict[str, HostLowRank]
"""One adapter's part for each matrix that it changes, by `adapter_key`."""

logger = logging.getLogger(__name__)


class Runtime:
    """What the engine's loop drives. Its methods are called from that loop alone, unless they say
    otherwise.

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
        self._adapters: Adapters | None = None
        self._cache: PagedCache | None = None
        self._state: SamplerState | None = None
        self.reset()
        programs.seal()

    @property
    def model_config(self) -> ModelConfig:
        return self.cache_spec.partition.config

    @cached_property
    def uses_all_cores(self) -> bool:
        """Whether a step takes the very cores that the host's part of the next one needs."""
        return holds_strips(self._spec.model)

    @property
    def weight_forms(self) -> dict[str, str]:
        """The form that each matrix is held in, by the name that rules are matched against."""
        return matrix_forms(self._spec.model)

    @property
    def num_shards(self) -> int:
        """Data shards: each has slots, pages and rows of a step of its own."""
        return self._spec.mesh.shape[DATA_AXIS]

    @property
    def page_size(self) -> int:
        return self.cache_spec.target.page_size

    @property
    def has_adapters(self) -> bool:
        """Whether the adapters' arrays are there; a load that failed has lost them."""
        return self._adapters is not None

    def reset(self) -> None:
        """Makes the cache and the sampler state anew, empty, and adapters where they are lost."""
        self._cache = self._state = None  # the old ones go first: both would not fit
        self._cache = self.cache_spec.allocate(self._spec.mesh)
        self._state = _allocate_state(self._spec.state)
        if self._adapters is None:
            self._adapters = self._spec.adapters.allocate(self._spec.mesh)
        # What the device has no room for fails here, not in the first step.
        jax.block_until_ready((self._cache, self._state, self._adapters))

    def bucket_for(self, plan: Plan) -> Bucket:
        """Returns the smallest bucket that takes every part of a plan.

        Raises LookupError, counted, for none.
        """
        num_rows, num_tokens = plan.most_rows, plan.most_tokens
        for bucket in self.programs.buckets:
            fits = num_tokens <= bucket.num_tokens and num_rows <= bucket.num_rows
            is_alike = bucket.has_prefill == plan.has_prefill
            if fits and is_alike and (bucket.num_drafts > 0) == plan.has_drafts:
                return bucket
        most_drafts = max(len(row.draft) for row in plan.rows)
        wanted = Bucket(num_tokens=num_tokens, num_rows=num_rows, num_drafts=most_drafts)
        self.programs.step(wanted)
        return wanted

    def edit(self, edit: SlotEdit, shard: int) -> None:
        """Prepares a slot of a data shard for a sequence."""
        assert self._state is not None
        self._state = self.programs.edit(self._state, edit, shard)

    def adapter_shapes(self) -> Adapters:
        """Returns the shapes, dtypes and placements of one adapter's arrays."""
        return self._spec.adapters.abstract_one(self._spec.mesh)

    def read_adapter(self, folder: Path) -> HostAdapter:
        """Reads a PEFT adapter's folder into host arrays; from any thread.

        Raises CheckpointError for one that does not fit the model or the room.
        """
        return PeftAdapter(folder, self._spec.adapters).read()

    def set_adapter(self, one: HostAdapter, slot: int) -> None:
        """Puts an adapter that was read into a slot; steps launched before do not see it.

        Raises RequestError: RESOURCE_EXHAUSTED where the devices have no memory for it, UNAVAILABLE
        where they do not take it, or where all adapters are lost; then `reset` makes them anew.
        """
        # Waits, so that one adapter at a time is on its way, as the memory plan has it, and that
        # what fails does so here and not in the steps after it.
        placed = self._place(one)
        adapters, self._adapters = self._adapters, None
        if adapters is None:  # lost a moment ago
            raise lost_adapters_error()
        try:
            changed = self.programs.set_adapter(adapters, placed, slot)
            self._adapters = jax.block_until_ready(changed)
        except Exception as error:  # whatever it is, the arrays were given away
            logger.exception("an adapter could not be put beside the others; all are lost")
            for array in jax.tree.leaves((adapters, placed)):
                array.delete()  # tracebacks may hold them while `reset` makes others
            raise lost_adapters_error() from error

    def _place(self, one: HostAdapter) -> Adapters:
        try:
            shapes = self.adapter_shapes().items()
            placed = {key: place_one(one.get(key), like) for key, like in shapes}
            return jax.block_until_ready(placed)
        except jax.errors.JaxRuntimeError as error:
            is_short = "RESOURCE_EXHAUSTED" in str(error)
            raise (adapter_memory_error() if is_short else placing_error()) from error

    def run(self, bucket: Bucket, words: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Launches a step on the words `[d, W]` of d data shards.

        Returns its results `[d, S, B, R]` and its prompt scores `[d, T, R]`, still on the devices.
        """
        assert self._adapters is not None
        assert self._cache is not None
        assert self._state is not None
        step = self.programs.step(bucket)
        self._cache, self._state, results, scores = step(
            self._weights, self._adapters, self._cache, self._state, words
        )
        return results, scores


def load_runtime(model: Path | str, config: EngineConfig, progress: Progress) -> Runtime:
    """Opens, plans, compiles and loads; see `Engine.load`."""
    start = time.monotonic()
    if config.compile_cache is not None:
        use_compile_cache(config.compile_cache)
    limit = memory_limit(devices_for(config.mesh)[0])
    checkpoint = open_checkpoint(locate(str(model)))
    deployment = plan_deployment(checkpoint.config, config)
    check_tensors(deployment.model, checkpoint)
    for note in deployment.model.partition.notes():
        progress(note)
    if deployment.cache_spec.num_pages == 0:
        deployment = _fill_with_cache(deployment, limit, progress)

    opened = time.monotonic()
    spec = deployment.program_spec()
    # What the shapes alone need is known now; the programs' temporaries once they are compiled.
    deployment.memory_plan(0, limit).check()
    programs = Programs(spec)
    try:
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(_load, deployment, checkpoint, progress)

            def watch(line: str) -> None:
                progress(line)
                if loading.done():
                    loading.result()  # raises now, not after all is compiled

            _prepare(programs, deployment, watch)
            compiled = time.monotonic()
            plan = deployment.memory_plan(programs.temporary_bytes(), limit)
            with _room_for(plan):
                loaded = loading.result()
        plan.check()
        _tidy_up(deployment.cache_spec.target.platform)
        prepared = time.monotonic()
        spec = replace(spec, model=loaded)
        with _room_for(plan):
            runtime = Runtime(programs, spec, deployment.cache_spec, deployment.max_context_len)
    except BaseException:
        programs.close()
        raise
    end = time.monotonic()
    progress(
        f"ready after {end - start:.1f} s: opened and planned {opened - start:.1f} s, programs"
        f" {compiled - opened:.1f} s while loading, loaded {prepared - compiled:.1f} s more,"
        f" allocated {end - prepared:.1f} s"
    )
    return runtime


@contextlib.contextmanager
def _room_for(plan: MemoryPlan) -> Iterator[None]:
    """Says it as a ConfigError where a device has no room for what is put there."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise plan.error("the device had no room for all of it") from error


def _fill_with_cache(deployment: Deployment, limit: int | None, progress: Progress) -> Deployment:
    """Gives the cache all that the weights and the largest program leave of the device."""
    probe = deployment.with_pages(deployment.config.mesh.data).program_spec()
    # Those that sample after every token need their memory for logits, the others for tokens.
    largest = {bucket.num_drafts: bucket for bucket in sorted(probe.layouts)}.values()
    progress("compiling the largest programs, to see how much memory is left for the cache")
    programs = Programs(replace(probe, layouts={b: probe.layouts[b] for b in largest}))
    try:
        programs.compile(progress)
        plan = deployment.memory_plan(programs.temporary_bytes(), cache_limit(limit))
    finally:
        programs.close()
    num_pages, refused = pages_that_fit(plan), deployment.cache_spec.refused_pages(deployment.mesh)
    if num_pages in refused:
        progress(
            f"{num_pages} pages would fit, but this device's kernels take at most"
            f" {refused.start - 1}, or at least {refused.stop}"
        )
        num_pages = refused.start - 1
    return deployment.with_pages(num_pages * deployment.config.mesh.data)


def _prepare(programs: Programs, deployment: Deployment, progress: Progress) -> None:
    """Reads compiled programs from the compile cache, or compiles them.

    On a CPU the table is kept in one file and made by another process; elsewhere that process
    could not have the device, and JAX's own cache keeps each program.
    """
    cache, is_cpu = deployment.config.compile_cache, deployment.cache_spec.target.platform == "cpu"
    if cache is None or not is_cpu:
        programs.compile(progress)
        return
    file = ProgramFile(cache, deployment)
    if _take(programs, file, progress):
        return
    status = compile_apart(deployment, file, progress)
    if not _take(programs, file, progress):
        progress(f"the process that compiles left no programs, status {status}; compiling here")
        programs.compile(progress)


def _take(programs: Programs, file: ProgramFile, progress: Progress) -> bool:
    """Takes the programs of a file; returns whether there are any that JAX takes."""
    start = time.monotonic()
    serialized = file.read()
    if serialized is None:
        return False
    try:
        programs.take(serialized)
    except jax.errors.JaxRuntimeError as error:
        progress(f"compiled programs in {file.path} cannot be used: {error}")
        return False
    progress(f"read {len(serialized)} compiled programs, {time.monotonic() - start:.1f} s")
    return True


def _tidy_up(platform: str) -> None:
    """Gives back what tracing, compiling and loading left behind: hundreds of megabytes."""
    jax.clear_caches()
    gc.collect()
    return_freed_memory()
    if platform == "cpu":
        keep_freed_memory()


def _load(deployment: Deployment, checkpoint: Checkpoint, progress: Progress) -> Decoder:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1.0 or done == total:
            last = now
            progress(f"loaded {done} of {total} tensors, {now - start:.1f} s")

    return load_weights(deployment.model, checkpoint, deployment.mesh, show)


def _allocate_state(state: SamplerState) -> SamplerState:
    num_slots, vocab_size = state.counts.shape
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.device_put(init_state(num_slots, vocab_size), placement)
