"""A model on its devices before any memory is taken: what is compiled, and what it will hold."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from pallasite.engine.batch_builder import max_bans
from pallasite.engine.bursts import MAX_STEPS
from pallasite.engine.config import EngineConfig
from pallasite.engine.layout import Layout
from pallasite.engine.planner import MemoryPlan, choose_num_pages, default_cpu_pages
from pallasite.engine.programs import ProgramSpec, bucket_ladder
from pallasite.engine.sampler_state import init_state
from pallasite.models.adapters import AdapterSpec
from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.errors import ConfigError
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.registry import make_model
from pallasite.models.sharding import DATA_AXIS, MeshShape, make_mesh, sharding
from pallasite.models.weights import holds_strips, placed
from pallasite.pallas_kernels.cpu import best_instructions
from pallasite.pallas_kernels.target import CPU, Target, cpu_target, target_of

MAX_VIRTUAL_DEVICES = 256
"""Into how many a CPU is cut at most: a larger mesh is refused, not tried."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Shapes and placements alone; the same inputs give the same one in any process.

    Attributes:
        model: the weights, without memory.
        cache_spec: of 0 pages where an accelerator's cache is to take what the rest leaves.
        max_context_len: tokens of one sequence at most.
    """

    config: EngineConfig
    model: Decoder
    mesh: Mesh
    cache_spec: CacheSpec
    max_context_len: int

    def with_pages(self, num_pages: int) -> "Deployment":
        return replace(self, cache_spec=replace(self.cache_spec, num_pages=num_pages))

    def program_spec(self) -> ProgramSpec:
        """Returns what is to be compiled."""
        config, model = self.config, self.model.config
        by_slot = sharding(self.mesh, ("slots",))
        state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_slot),
            jax.eval_shape(lambda: init_state(config.max_requests, model.vocab_size)),
        )
        target = self.cache_spec.target
        buckets = bucket_ladder(
            config.requests_per_shard,
            config.batch_tokens_per_shard,
            target.pads_rows_to,
            config.num_drafts,
            self._max_steps(),
        )
        pages_per_request = -(-self.max_context_len // target.page_size)
        num_bans = max_bans(config.limits, len(model.eos_token_ids))
        layouts = {
            bucket: Layout(bucket=bucket, pages_per_request=pages_per_request, num_bans=num_bans)
            for bucket in buckets
        }
        cache = self.cache_spec.abstract(self.mesh)
        return ProgramSpec(
            model=self.model,
            adapters=self.adapter_spec(),
            cache=cache,
            state=state,
            layouts=layouts,
            mesh=self.mesh,
        )

    def _max_steps(self) -> int:
        """Steps that a run of a decode program makes at most."""
        return MAX_STEPS if holds_strips(self.model) else 1

    def adapter_spec(self) -> AdapterSpec:
        """Returns the room for adapters."""
        return AdapterSpec(
            model=self.model,
            target=self.cache_spec.target,
            num_slots=self.config.max_adapters,
            rank=self.config.adapter_rank,
        )

    def memory_plan(self, temporaries: int, limit: int | None) -> MemoryPlan:
        """Returns the bytes of all that a device holds.

        Args:
            temporaries: of the largest program; 0 while nothing is compiled.
            limit: what a device has; virtual devices of one CPU share it.
        """
        spec, mesh, shape = self.cache_spec, self.mesh, self.config.mesh
        shares = shape.num_devices if spec.target.platform == "cpu" else 1
        page, room = spec.page_bytes // shape.model, self.adapter_spec()
        return MemoryPlan(
            weights=_bytes_a_device(self.model),
            adapters=_bytes_a_device(room.abstract(mesh)),
            loading=_bytes_a_device(room.abstract_one(mesh)),
            cache=spec.num_pages // shape.data * page,
            page=page,
            sampler=_bytes_a_device(self.program_spec().state),
            temporaries=temporaries,
            limit=None if limit is None else limit // shares,
        )


def plan_deployment(
    model: ModelConfig, config: EngineConfig, devices: Sequence[jax.Device] | None = None
) -> Deployment:
    """Plans a model on a mesh of the first of `devices`, or of this process's.

    Raises ConfigError where the model cannot be served so.
    """
    devices = devices or devices_for(config.mesh)
    target = target_for(devices[0])
    if config.cache_form == "fp8" and not target.multiplies_fp8:
        raise ConfigError(
            f"got cache='fp8' for {target.name}, which does not multiply fp8; allowed are auto and"
            " int8; choose one"
        )
    mesh = make_mesh(config.mesh, devices)
    max_context_len = _context_len(config, model)
    # Ropes that stretch long contexts go by what is served, not by what could be.
    model = replace(model, context_len=max_context_len)
    if config.weights == "auto" and target.instructions:
        stored = (*model.stored_forms, *model.block_forms)
        model = replace(model, stored_forms=stored, block_forms=())
    abstract = make_model(model, config.base_form, target, config.mesh.model, config.quantize)
    num_pages = choose_num_pages(config, target.page_size)
    if num_pages is None:
        is_cpu = target.platform == "cpu"
        num_pages = default_cpu_pages(config, target.page_size, max_context_len) if is_cpu else 0
    cache_spec = CacheSpec(
        partition=abstract.partition, target=target, form=config.cache_form, num_pages=num_pages
    )
    _check_pages(cache_spec, mesh)
    return Deployment(
        config=config,
        model=placed(abstract, mesh),
        mesh=mesh,
        cache_spec=cache_spec,
        max_context_len=max_context_len,
    )


def devices_for(mesh: MeshShape) -> list[jax.Device]:
    """Returns this process's devices; a CPU is cut into as many virtual ones as the mesh needs.

    It can be, where JAX has not looked for devices yet and XLA_FLAGS does not say how many.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has looked already
            count = min(mesh.num_devices, MAX_VIRTUAL_DEVICES)
            jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


def target_for(device: jax.Device) -> Target:
    """Returns what is compiled for on a device; raises ConfigError where nothing can be."""
    try:
        target = target_of(device.platform, device.device_kind)
    except NotImplementedError as error:
        raise ConfigError(
            f"{error}; take a machine with one of them, or set JAX_PLATFORMS=cpu to use its CPU"
        ) from error
    return cpu_target(best_instructions()) if target == CPU else target


def _bytes_a_device(tree: Any) -> int:
    """The bytes of placed arrays or abstract ones that each device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _check_pages(spec: CacheSpec, mesh: Mesh) -> None:
    refused, data = spec.refused_pages(mesh), mesh.shape[DATA_AXIS]
    if spec.num_pages // data in refused:
        fewer, more = (refused.start - 1) * data, refused.stop * data
        page = spec.target.page_size
        raise ConfigError(
            f"got a cache of {spec.num_pages} pages, {spec.num_pages * page} tokens; on"
            f" {spec.target.name} this model's cache in {spec.form} must be of at most {fewer}"
            f" pages, {fewer * page} tokens, or of at least {more} pages, {more * page} tokens;"
            " lower or raise --cache-tokens or --num-pages"
        )


def _context_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_context_len
    if wanted is not None and wanted > model.context_len:
        raise ConfigError(
            f"got max_context_len={wanted}; this model was made for {model.context_len} tokens at"
            " most; lower it"
        )
    return model.context_len if wanted is None else wanted
