"""A model loaded and run on a mesh, without an engine."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.decoder import Decoder, forward, unembed
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.loader import load_weights
from pallasite.models.lora import batch_adapters
from pallasite.models.registry import make_model
from pallasite.models.sharding import MeshShape, make_mesh
from pallasite.models.weights import placed
from pallasite.pallas_kernels.target import CPU


def mesh_of(data: int = 1, model: int = 1) -> Mesh:
    return make_mesh(MeshShape(data=data, model=model), jax.devices("cpu"))


def load(checkpoint: Checkpoint, form="f32", target=CPU, mesh=None, rules=(), **arguments):
    """Returns the checkpoint's model on a mesh, by default of one device."""
    mesh = mesh or mesh_of()
    abstract = make_model(checkpoint.config, form, target, mesh.shape["model"], rules)
    return load_weights(placed(abstract, mesh), checkpoint, mesh, **arguments)


class Program:
    """A model and its cache on a mesh, and what runs batches on them, compiled once a shape."""

    def __init__(self, model: Decoder, spec: CacheSpec, mesh: Mesh) -> None:
        self._spec, self._mesh, self._model = spec, mesh, model
        self.reset()
        own = (_placements(model), _placements(self.cache))
        whole = PartitionSpec()

        def run(model, cache, token_ids, ragged):
            none = batch_adapters({}, jnp.full_like(ragged.kv_lens, -1), ragged, len(token_ids))
            hidden, cache = forward(model, cache, token_ids, ragged, none)
            return unembed(model, hidden), cache

        step = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(*own, whole, whole),
            out_specs=(whole, own[1]),
            check_vma=False,
        )
        self._step = jax.jit(step, donate_argnums=1)

    def use(self, model: Decoder) -> None:
        """Takes another model's weights, of the same shapes, in place of its own."""
        self._model = model

    def reset(self) -> None:
        """Empties the cache."""
        self.cache = self._spec.allocate(self._mesh)

    def logits(self, token_ids, ragged) -> np.ndarray:
        """Runs a batch, the same in every data shard; returns f32 [T, V], the same everywhere."""
        logits, self.cache = self._step(self._model, self.cache, token_ids, ragged)
        first, *others = (np.asarray(shard.data) for shard in logits.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(first, other)
        return first

    def text(self, token_ids, ragged) -> str:
        """Returns the compiled program of a batch's shape, in HLO."""
        leaves, tree = jax.tree.flatten(ragged)

        # Lowering makes trees of the arguments' descriptions, which are not what Ragged is made of.
        def step(model, cache, token_ids, leaves):
            return self._step(model, cache, token_ids, tree.unflatten(leaves))

        lowered = jax.jit(step, donate_argnums=1).lower(self._model, self.cache, token_ids, leaves)
        return lowered.compile().as_text()


def _placements(tree):
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
