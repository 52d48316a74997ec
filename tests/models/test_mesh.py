"""Models on meshes of devices give one device's logits, in every form.

Meshes are of virtual CPU devices, which run the same programs and the same collectives. Devices
that share a model add up their parts in an order of their own, so logits differ by f32's noise:
here some 1e-6 of the largest, and 1e-5 is what is allowed.
"""

import numpy as np
import pytest

from pallasite.models.sharding import MeshShape
from tests.parity.forward import Forward
from tests.parity.tiny_models import TINY_MODELS
from tests.tiny_checkpoints import write_hf

MESHES = [
    MeshShape(data=data, model=model)
    for data in (1, 2, 4, 8)
    for model in (1, 2, 4, 8)
    if data * model in (2, 4, 8)
]
MODEL4 = MeshShape(model=4)
SIZE = 24
CHUNKS = [20, SIZE]
"""The second is prefilled over what the first left in the cache."""
DECODES = [SIZE, *[1] * 16]
NOISE = 1e-5
"""Of the largest logit."""


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """`logits(name, mesh, chunks, ...)`: f32 [T, V] of a tiny model's first tokens; kept."""
    kept, folders = {}, {}

    def run(name, mesh=None, chunks=CHUNKS, **form):
        key = (name, mesh, tuple(chunks), *sorted(form.items()))
        if name not in folders:
            tiny = TINY_MODELS[name]
            folder = tmp_path_factory.mktemp("models") / name
            folders[name] = write_hf(folder, tiny.config, tiny.tensors())
        if key not in kept:
            forward = Forward(folders[name], "f32", SIZE, mesh=mesh, **form)
            kept[key] = forward.logits(TINY_MODELS[name].token_ids()[: sum(chunks)], chunks)
            assert np.isfinite(kept[key]).all()
        return kept[key]

    return run


def assert_same(ours, expected):
    largest = np.abs(expected).max()
    difference = np.abs(ours - expected).max() / largest
    print(f"largest |difference of logits| {difference:.1e} of the largest")
    assert difference < NOISE
    assert expected.std() > 0.1 * largest  # no constant
    # What a greedy request would be given.
    np.testing.assert_array_equal(ours.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits_on_every_split(mesh, logits):
    """Three query heads over one key head, 131 rows and 58 channels: all is padded or copied."""
    assert_same(logits("odd-sizes", mesh), logits("odd-sizes"))


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("no-groups", CHUNKS), ("groups-of-3-tied", DECODES)],
)
def test_logits_of_other_models(name, chunks, logits):
    assert_same(logits(name, MODEL4, chunks), logits(name, None, chunks))


FORMS = {
    "int8": {"rules": (("", "int8"),)},
    "int4:16": {"rules": (("", "int4:16"),)},
    "w8a8:16": {"rules": (("proj", "w8a8:16"),)},
    "fp8": {"rules": (("", "fp8"),)},
    "int8 cache": {"cache": "int8"},
}
ROUNDS_AT_RUN_TIME = ("w8a8:16", "int8 cache")


@pytest.mark.parametrize("form", FORMS)
def test_quantized_logits(form, logits):
    """Weights are rounded once, on the host, so that nothing but f32's noise is left.

    What is rounded as it is computed may fall the other way for that noise: at a few positions,
    and by less than a tenth of what rounding it at all comes to.
    """
    name, mesh = "no-groups", MeshShape(data=2, model=4)
    ours, expected = logits(name, mesh, **FORMS[form]), logits(name, **FORMS[form])
    largest = np.abs(expected).max()
    rounding = np.abs(expected - logits(name)).max()
    assert rounding > 3e-3 * largest
    if form not in ROUNDS_AT_RUN_TIME:
        assert_same(ours, expected)
        return
    difference = np.abs(ours - expected).max(axis=1)
    print(
        f"of the largest: {np.median(difference) / largest:.1e}, {difference.max() / largest:.1e}"
    )
    assert np.median(difference) < NOISE * largest
    assert difference.max() < 0.1 * rounding
