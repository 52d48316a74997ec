"""Times of programs on a device: loops whose steps take the last one's result."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallasite.pallas_kernels.compile import Case

ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Times:
    """What one kernel took for one load.

    Attributes:
        kernel: whose.
        load: of what.
        cache: what the cache holds.
        median_s, least_s: seconds of a step, over ROUNDS runs.
        num_bytes: what must be moved.
        flops: what must be computed.
    """

    kernel: str
    load: str
    cache: str
    median_s: float
    least_s: float
    num_bytes: int
    flops: int


def seconds(step: Callable[..., Any], carry: Any, constants: Any, num_steps: int) -> list[float]:
    """Returns the seconds of a step in each of ROUNDS runs of as many, after one more."""

    def loop(carry: Any, constants: Any) -> Any:
        return jax.lax.fori_loop(
            0, num_steps, lambda index, carry: step(index, carry, constants), carry
        )

    compiled = jax.jit(loop, donate_argnums=0)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(carry, constants))
        times.append((time.perf_counter() - start) / num_steps)
    return times[1:]


def random_arguments(case: Case) -> Any:
    """Returns arrays of the shapes that a case is made of: floats N(0, 1), integers any."""
    rng = np.random.default_rng(0)

    def make(struct: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(struct.dtype, jnp.integer):
            lowest, highest = jnp.iinfo(struct.dtype).min, jnp.iinfo(struct.dtype).max
            return jnp.asarray(rng.integers(lowest, highest + 1, struct.shape, struct.dtype.name))
        return jnp.asarray(rng.standard_normal(struct.shape, np.float32)).astype(struct.dtype)

    return jax.tree.map(make, case.arguments)
