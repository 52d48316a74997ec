"""Every family's logits against transformers', from both kinds of file and by every schedule.

The goldens are those that make_family_goldens.py wrote; every weight and setting counts in them.
"""

import numpy as np
import pytest

from pallasite.models.registry import FAMILIES
from pallasite.models.sharding import MeshShape
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_gguf, write_family_hf
from tests.parity.family_changes import FAMILY_CHANGES, changed
from tests.parity.figures import MAX_LOGIT_DIFFERENCE
from tests.parity.forward import Forward
from tests.parity.test_parity import SCHEDULES, golden
from tests.parity.tiny_models import NUM_TOKENS, checksum

FILES = [(name, "safetensors") for name in FAMILY_MODELS]
FILES += [(name, "gguf") for name, model in FAMILY_MODELS.items() if model.has_gguf]
# Of each family the one whose key heads are hardest to share: three or one.
ONE_OF_EACH = [
    "llama-one-key-head",
    "mistral-narrow-heads",
    "qwen2-windows",
    "qwen3-windows",
    "gemma3-one-key-head",
    "phi3-long-rope",
    "olmo2-groups",
]


def expected_of(name):
    model, expected = FAMILY_MODELS[name], golden(f"family-{name}")
    assert checksum(model.tensors()) == str(expected["checksum"]), (
        "the random weights are not those of the golden; make it again with `make parity`"
    )
    np.testing.assert_array_equal(model.token_ids(), expected["token_ids"])
    assert expected["logits"].std() > 0.9  # a constant would not pass
    return expected["logits"]


@pytest.mark.parametrize(("name", "form"), FILES)
def test_logits(name, form, tmp_path):
    tiny, expected = FAMILY_MODELS[name], expected_of(name)
    if form == "gguf":
        path = write_family_gguf(tmp_path / "model.gguf", tiny)
    else:
        path = write_family_hf(tmp_path / "model", tiny, shards=2)
    model = Forward(path, "f32", NUM_TOKENS)
    for schedule, chunks in SCHEDULES.items():
        logits = model.logits(tiny.token_ids(), chunks)
        difference = np.abs(logits - expected).max()
        print(
            f"{name}, {form}, {schedule}: largest |difference of logits| {difference:.2e}, of"
            f" logits {np.abs(expected).max():.1f}"
        )
        assert np.isfinite(logits).all()
        # The limit, and what f32 leaves of it: roundings grow with the size of the logits.
        assert difference < MAX_LOGIT_DIFFERENCE
        assert difference < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_logits_of_devices_that_share_a_model(name, num_devices, tmp_path):
    tiny, expected = FAMILY_MODELS[name], expected_of(name)
    path = write_family_hf(tmp_path / "model", tiny)
    model = Forward(path, "f32", NUM_TOKENS, mesh=MeshShape(model=num_devices))
    logits = model.logits(tiny.token_ids(), SCHEDULES["prefill, then decode"])
    difference = np.abs(logits - expected).max()
    print(f"{name} on {num_devices} devices: largest |difference of logits| {difference:.2e}")
    assert np.isfinite(logits).all()
    assert difference < MAX_LOGIT_DIFFERENCE
    assert difference < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "change"), [(name, c) for name, changes in FAMILY_CHANGES.items() for c in changes]
)
def test_a_wrong_config_would_be_seen(name, change, tmp_path):
    tiny, expected = FAMILY_MODELS[name], expected_of(name)
    path = write_family_hf(tmp_path / "model", tiny, hf=changed(tiny.hf, change))
    logits = Forward(path, "f32", NUM_TOKENS).logits(tiny.token_ids(), [NUM_TOKENS])
    assert np.abs(logits - expected).max() > 10 * MAX_LOGIT_DIFFERENCE


def test_no_family_is_left_out():
    assert {model.config.family for model in FAMILY_MODELS.values()} == set(FAMILIES)
    assert {FAMILY_MODELS[name].config.family for name in ONE_OF_EACH} == set(FAMILIES)
