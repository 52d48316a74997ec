"""A model's step as a program for a GPU, lowered without one."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pallasite.models.decoder import forward
from pallasite.models.forms import EVERY_LAYER
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.lora import batch_adapters
from pallasite.models.registry import make_model
from pallasite.models.weights import placed
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import H100
from tests.models.running import mesh_of
from tests.pallas_kernels.compilers import lowered_for_gpu
from tests.tiny_checkpoints import TINY


def lowered(form, num_tokens, num_rows):
    """Returns StableHLO of a tiny model's step, with its layers' matrices in this form."""
    mesh = mesh_of()
    rules = ((EVERY_LAYER, form),)
    model = placed(make_model(TINY, "bf16", H100, 1, rules), mesh)
    spec = CacheSpec(partition=model.partition, target=H100, form="bf16", num_pages=9)
    cache = spec.abstract(mesh)
    shapes = {
        "positions": (num_tokens,),
        "kv_lens": (num_rows,),
        "query_starts": (num_rows + 1,),
        "page_table": (num_rows, 4),
        "num_requests": (),
        "num_decode": (),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    def step(model, cache, token_ids, batch):
        ragged = Ragged(**batch)
        none = batch_adapters({}, jnp.full_like(ragged.kv_lens, -1), ragged, num_tokens)
        return forward(model, cache, token_ids, ragged, none)

    own = [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (model, cache)]
    whole = PartitionSpec()
    step = jax.shard_map(
        step, in_specs=(*own, whole, whole), out_specs=(whole, own[1]), check_vma=False
    )
    token_ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    arguments = model, cache, token_ids, batch
    return lowered_for_gpu(H100, jax.jit(step), *arguments, mesh=mesh.abstract_mesh)


def kernels(text):
    return re.findall(r'name = "(quantized_matmul|paged_attention_\w+)"', text)


def sliced_matrices(text):
    """Returns the shapes of one layer's part of stacked matrices, scales of whole rows left out."""
    slices = re.findall(r"dynamic_slice .*-> tensor<1x(\d+x\d+)x\w+>", text)
    return [shape for shape in slices if not shape.endswith("x1")]


@pytest.mark.parametrize("form", ["bf16", "int8", "int4", "w8a8"])
def test_a_steps_matrices_are_read_where_they_are_stacked(form):
    text = lowered(form, num_tokens=4, num_rows=4)
    # q, k and v; o, gate, up and down.
    attention = ["paged_attention_write", "paged_attention_decode"]
    assert kernels(text) == ["quantized_matmul"] * 3 + attention + ["quantized_matmul"] * 4
    assert sliced_matrices(text) == []


def test_a_step_of_many_tokens_has_xlas_products():
    text = lowered("bf16", num_tokens=300, num_rows=4)
    attention = [f"paged_attention_{name}" for name in ("write", "decode", "prefill")]
    assert kernels(text) == attention
    # Those of one shape share a function.
    assert set(sliced_matrices(text)) == {"64x64", "32x64", "128x64", "64x128"}
