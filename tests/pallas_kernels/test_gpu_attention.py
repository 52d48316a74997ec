"""The GPU's kernels of paged attention as programs: that they lower, and are few.

What they compute is tested with all bodies, in test_paged_attention.py; what they take, by
test_gpu_registers.py.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from pallasite.pallas_kernels import paged_attention
from pallasite.pallas_kernels.paged_attention import gpu_prefill
from pallasite.pallas_kernels.paged_attention.gpu_block import Inputs
from pallasite.pallas_kernels.target import find_target
from tests.pallas_kernels import attention_programs, gpu_registers
from tests.pallas_kernels.compilers import lowered_for_gpu

TYPES = [(held_as, width) for held_as in gpu_registers.HELD_AS for width in gpu_registers.WIDTHS]


def lowered(chip="gpu:h100", **options):
    target = find_target(chip)
    case = attention_programs.step(target, **options)
    function = jax.jit(case.function, donate_argnums=case.donated)
    return lowered_for_gpu(target, function, *case.arguments)


def kernels(text):
    return re.findall(r'name = "paged_attention_(\w+)"', text)


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("chip", ["gpu:h100", "gpu:b200"])
@pytest.mark.parametrize(("held_as", "width"), TYPES)
def test_every_kind_of_cache_is_lowered(held_as, width, chip, variant):
    text = lowered(chip, held_as=held_as, head_width=width, variant=variant)
    assert kernels(text) == ["write", "decode", "merge", "prefill"]


@pytest.mark.parametrize(
    "heads",
    [
        {"num_heads": 8, "num_kv_heads": 1, "head_width": 128},
        {"num_heads": 71, "num_kv_heads": 1, "head_width": 64},
        {"num_heads": 9, "num_kv_heads": 3, "head_width": 64},
        {"num_heads": 32, "num_kv_heads": 32, "head_width": 96},
        {"num_heads": 4, "num_kv_heads": 2, "head_width": 16},
    ],
    ids=str,
)
def test_heads_of_any_number_and_width_are_lowered(heads):
    assert len(kernels(lowered(**heads, held_as="int8", num_pages=100))) == 4


def test_a_bucket_for_decoding_alone_has_no_prefill():
    assert kernels(lowered(num_tokens=64, num_rows=64)) == ["write", "decode", "merge"]
    # Where sequences are so short that splits would be too small, one takes them whole.
    short = lowered(num_tokens=64, num_rows=64, max_len=256)
    assert kernels(short) == ["write", "decode"]


@pytest.mark.parametrize("held_as", ["int8", "float8_e4m3fn"])
def test_a_cache_that_would_be_addressed_wrongly_is_refused(held_as):
    # 8 layers of 64 KiB a page.
    of_2_gib = {"held_as": held_as, "num_pages": 2**31 // (8 * 2**16)}
    lowered(**of_2_gib)
    words = "at most 2 GiB or of more than 4 GiB; give it 4096 pages at most, or 8193 at least"
    for num_pages in (of_2_gib["num_pages"] + 1, 2 * of_2_gib["num_pages"]):
        with pytest.raises(ValueError, match=words):
            lowered(held_as=held_as, num_pages=num_pages)
    lowered(held_as=held_as, num_pages=2 * of_2_gib["num_pages"] + 1)
    lowered(num_pages=of_2_gib["num_pages"] + 1)


@pytest.mark.parametrize(
    ("held_as", "page_values", "refused"),
    [
        ("int8", 2**19, range(4097, 8193)),
        # Of neither 2 GiB nor 4 GiB a divisor.
        ("int8", 3 * 2**19, range(1366, 2731)),
        ("float8_e4m3fn", 2**19, range(4097, 8193)),
        ("bfloat16", 2**19, range(0)),
        ("float32", 2**19, range(0)),
    ],
)
def test_the_op_says_which_numbers_of_pages_its_kernels_refuse(held_as, page_values, refused):
    values = jax.ShapeDtypeStruct((2, 5, 1, 2, 32, page_values // 128), held_as)
    cache = paged_attention.PagedCache(values=values)
    told = paged_attention.refused_pages(cache, find_target("gpu:h100"))
    assert len(told) == len(refused)
    assert not refused or told == refused
    assert not paged_attention.refused_pages(cache, find_target("tpu:v6e"))


def test_a_gpu_of_which_nothing_is_known_has_smaller_blocks():
    inputs = dict.fromkeys(Inputs._fields)
    inputs["q"] = jax.ShapeDtypeStruct((512, 32, 128), jnp.bfloat16)
    inputs["values"] = jax.ShapeDtypeStruct((1, 9, 8, 2, 32, 128), jnp.bfloat16)
    plans = [
        gpu_prefill._Plan.make(Inputs(**inputs), find_target(name)) for name in ("gpu", "gpu:h200")
    ]
    assert [plan.block_tokens for plan in plans] == [64, 128]
    assert len(kernels(lowered("gpu", num_pages=100))) == 4
