"""Programs for GPUs that are not there, as far as JAX alone takes them."""

import jax

from pallasite.pallas_kernels.compile.gpu import abstract_mesh


def lowered_for_gpu(target, function, *arguments, mesh=None):
    """Returns StableHLO of a jitted function; no compiler for GPUs is needed so far."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(target, mesh)):
        return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
