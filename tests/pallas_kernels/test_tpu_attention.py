"""The TPU's kernels of paged attention as programs: that they compile for every chip, in place.

What they compute is tested with all bodies, in test_paged_attention.py. Compiling needs libtpu, the
extra `tpu`, and no TPU.
"""

import jax
import pytest

from pallasite.pallas_kernels.compile import compile_for
from pallasite.pallas_kernels.paged_attention.block_table import ENTRIES
from pallasite.pallas_kernels.target import TARGETS, find_target
from tests.pallas_kernels import attention_programs

CHIPS = [name for name, target in TARGETS.items() if target.platform == "tpu"]
HELD_AS = ("float32", "bfloat16", "int8", "float8_e4m3fn")
SMALL = {"num_heads": 8, "num_kv_heads": 2, "num_tokens": 256, "num_rows": 16, "num_pages": 2048}


def is_held(chip, held_as):
    """An fp8 cache is refused on chips that do not multiply fp8."""
    return held_as != "float8_e4m3fn" or find_target(chip).multiplies_fp8


def compiled(chip, mode="compile", **options):
    return compile_for(f"{attention_programs.__name__}:step", chip, SMALL | options, mode)


def check_in_place(report, chip, **options):
    """The kernels are there, and the cache is neither copied nor given back elsewhere."""
    names = [kernel.name for kernel in report.kernels]
    assert names == [f"paged_attention_{name}" for name in ("write", "decode", "prefill")]
    cache = attention_programs.cache_bytes(
        attention_programs.step(find_target(chip), **(SMALL | options))
    )
    assert report.memory.aliased == cache
    assert report.memory.temporaries < cache // 16
    assert report.num_copies(cache // 64) == 0


@pytest.mark.parametrize(
    ("chip", "held_as"),
    [(chip, held_as) for chip in CHIPS for held_as in HELD_AS if is_held(chip, held_as)],
)
def test_every_kind_of_cache_compiles_for_every_chip(chip, held_as):
    options = {"held_as": held_as, "variant": "all"}
    check_in_place(compiled(chip, **options), chip, **options)
