"""The Llama family: its declarations, and that a request's neighbours change nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.config import Llama3Rope, ModelConfig
from pallasite.models.errors import ConfigError
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.registry import make_model
from pallasite.models.weights import declared_weights, named_weights, num_bytes, source_of
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import CPU, TARGETS, V6E
from tests.models.running import Program, load, mesh_of
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

LLAMA31_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    num_layers=32,
    model_width=4096,
    ffn_width=14336,
    num_query_heads=32,
    num_kv_heads=8,
    head_width=128,
    context_len=131072,
    norm_epsilon=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3Rope(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_len=8192
    ),
)
SMOLLM2 = replace(
    LLAMA31_8B,
    vocab_size=49152,
    num_layers=30,
    model_width=576,
    ffn_width=1536,
    num_query_heads=9,
    num_kv_heads=3,
    head_width=64,
    rope_scaling=None,
    ties_embedding=True,
)


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_in_norms"),
    [(LLAMA31_8B, 8_030_261_248, 65 * 4096), (SMOLLM2, 134_515_008, 61 * 576)],
    ids=["Llama-3.1-8B", "SmolLM2-135M"],
)
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_published_model_takes_no_memory_until_it_is_loaded(
    config, num_parameters, num_in_norms, target
):
    before = {id(array) for array in jax.live_arrays()}
    f32, bf16 = (make_model(config, form, target) for form in ("f32", "bf16"))
    weights = dict(named_weights(bf16))
    assert sum(weight.size for weight in weights.values()) == num_parameters
    assert num_bytes(f32) == 4 * num_parameters
    # Norms stay f32.
    assert num_bytes(bf16) == 2 * num_parameters + 2 * num_in_norms
    assert {type(leaf) for leaf in jax.tree.leaves(bf16)} == {jax.ShapeDtypeStruct}
    assert [array for array in jax.live_arrays() if id(array) not in before] == []


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_what_weights_are_held_as(target):
    weights = dict(named_weights(make_model(TINY, "bf16", target)))
    stacked = jnp.uint16 if target is CPU else jnp.bfloat16
    for name, weight in weights.items():
        is_norm = "norm" in name
        is_stacked = name.startswith("layers.")
        expected = jnp.float32 if is_norm else stacked if is_stacked else jnp.bfloat16
        assert weight.dtype == expected, name


def test_weights_are_declared_with_the_checkpoints_names():
    weights = dict(declared_weights(make_model(TINY, "f32", V6E)))
    sources = {name: source_of(weight).name for name, weight in weights.items()}
    layer = "model.layers.{layer}."
    assert sources == {
        "embedding": "model.embed_tokens.weight",
        "layers.attention_norm.scale": layer + "input_layernorm.weight",
        "layers.ffn_norm.scale": layer + "post_attention_layernorm.weight",
        "layers.attention.q": layer + "self_attn.q_proj.weight",
        "layers.attention.k": layer + "self_attn.k_proj.weight",
        "layers.attention.v": layer + "self_attn.v_proj.weight",
        "layers.attention.o": layer + "self_attn.o_proj.weight",
        "layers.ffn.gate": layer + "mlp.gate_proj.weight",
        "layers.ffn.up": layer + "mlp.up_proj.weight",
        "layers.ffn.down": layer + "mlp.down_proj.weight",
        "final_norm.scale": "model.norm.weight",
        "head": "lm_head.weight",
    }
    assert "head" not in dict(
        declared_weights(make_model(replace(TINY, ties_embedding=True), "f32", V6E))
    )


def test_a_family_that_is_not_known_is_a_config_error():
    with pytest.raises(ConfigError, match="family 'mamba'; served are llama"):
        make_model(replace(TINY, family="mamba"), "f32", CPU)


B, T, MAX_LEN = 4, 48, 64


@pytest.fixture(scope="module", params=["f32", "bf16"])
def model(request, tmp_path_factory):
    tensors = random_tensors(TINY)
    # Ten times the spread of a model at its start: attention is peaked.
    tensors = {n: t if t.ndim == 1 else 10 * t for n, t in tensors.items()}
    folder = write_hf(tmp_path_factory.mktemp("model"), TINY, tensors)
    model = load(open_checkpoint(folder), request.param)
    num_pages = B * MAX_LEN // CPU.page_size
    spec = CacheSpec(partition=model.partition, target=CPU, form=request.param, num_pages=num_pages)
    return Program(model, spec, mesh_of()), request.param


def run(program, rows, num_decode=0):
    """Runs (token ids, first position, pages) of each row; returns each row's logits."""
    counts = [len(ids) for ids, _, _ in rows]
    ids, positions = np.zeros((2, T), np.int32)
    kv_lens, query_starts = np.zeros(B, np.int32), np.full(B + 1, sum(counts), np.int32)
    page_table = np.zeros((B, MAX_LEN // CPU.page_size), np.int32)
    start = 0
    for row, (row_ids, first, pages) in enumerate(rows):
        end = start + len(row_ids)
        query_starts[row], kv_lens[row] = start, first + len(row_ids)
        ids[start:end], positions[start:end] = row_ids, np.arange(first, first + len(row_ids))
        page_table[row, : len(pages)] = pages
        start = end
    ragged = Ragged(
        positions=jnp.asarray(positions),
        kv_lens=jnp.asarray(kv_lens),
        query_starts=jnp.asarray(query_starts),
        page_table=jnp.asarray(page_table),
        num_requests=jnp.asarray(len(rows), jnp.int32),
        num_decode=jnp.asarray(num_decode, jnp.int32),
    )
    logits = program.logits(jnp.asarray(ids), ragged)
    return np.split(logits, query_starts[1 : len(rows) + 1])[: len(rows)]


def test_a_request_in_a_batch_has_the_logits_that_it_has_alone(model, rng):
    program, form = model
    texts = [rng.integers(0, 320, n).astype(np.int32) for n in (21, 33, 17, 9)]
    pages = np.split(rng.permutation(16), 4)
    alone = []
    for ids, own in zip(texts, pages, strict=True):
        (logits,) = run(program, [(ids, 0, own)])
        alone.append(logits)
        assert logits.std() > 0.1

    # Two prompts but for their last token; then these two, decoded beside two further prompts.
    program.reset()
    run(program, [(texts[0][:-1], 0, pages[0]), (texts[2][:-1], 0, pages[2])])
    rows = [
        (texts[0][-1:], 20, pages[0]),
        (texts[2][-1:], 16, pages[2]),
        (texts[1], 0, pages[1]),
        (texts[3], 0, pages[3]),
    ]
    logits = run(program, rows, num_decode=2)
    expected = [alone[0][-1:], alone[2][-1:], alone[1], alone[3]]
    for ours, theirs in zip(logits, expected, strict=True):
        scale = np.abs(theirs).max()
        # In bfloat16 a sum in another order may round the other way, once or twice in a row.
        tolerance = {"f32": 1e-5, "bf16": 2e-2}[form] * scale
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_a_token_changes_the_logits_at_and_after_it_alone(model, rng):
    program, _ = model
    ids = rng.integers(0, 320, 40).astype(np.int32)
    changed = ids.copy()
    changed[25] = (changed[25] + 1) % 320
    (before,) = run(program, [(ids, 0, np.arange(3))])
    (after,) = run(program, [(changed, 0, np.arange(3))])
    np.testing.assert_array_equal(before[:25], after[:25])
    assert (np.abs(before[25:] - after[25:]).max(axis=1) > 1e-4).all()
