"""The strictness that conftest.py promises is really on; without it other tests prove less."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from pallasite.models.pull import locate


def test_annotations_are_checked_at_each_call():
    with pytest.raises(TypeCheckError, match="model"):
        locate(3)


def test_types_are_not_promoted():
    with pytest.raises(ValueError, match="implicit"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="a warning"):
        warnings.warn("a warning", stacklevel=1)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def test_random_numbers_are_each_tests_own(rng, request):
    other = np.random.default_rng(0).standard_normal(4)
    drawn = rng.standard_normal(4)
    assert np.isfinite(drawn).all()
    assert not np.array_equal(drawn, other)
    assert request.config.option.hypothesis_seed is not None


def test_repetitions_are_few_unless_all_are_asked_for(repetitions, request):
    assert repetitions(2, 2000) == (2000 if request.config.option.full else 2)
