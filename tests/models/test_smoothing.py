"""Smoothing changes no logit and makes rounding cheaper; the inputs' sizes are measured right."""

from dataclasses import replace

import numpy as np
import pytest

from pallasite.models.calibration import measure_inputs
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.checkpoint_write import surroundings_of, write_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.forms import EVERY_LAYER, parse_form
from pallasite.models.quantize import quantize
from pallasite.models.smoothing import Smoothed
from pallasite.pallas_kernels.target import CPU
from tests.engine.llama_oracle import LlamaOracle
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_hf
from tests.models.running import load, mesh_of
from tests.models.test_loader import InMemory
from tests.parity.forward import Forward
from tests.tiny_checkpoints import TINY, random_tensors

TEXTS = ([5, 9, 200, 31, 77, 4, 60, 13, 250, 8, 91], [3, 1, 4, 1, 5], [17])
FAMILIES = {model.config.family: name for name, model in FAMILY_MODELS.items()}.values()
"""One model of each family."""


class Recorded:
    """A weight that notes what it is multiplied with, where numpy would multiply."""

    __array_ufunc__ = None

    def __init__(self, name, weight, seen):
        self.name, self.weight, self.seen = name, weight, seen

    @property
    def T(self):
        return self

    def __getitem__(self, index):
        return self.weight[index]

    def __rmatmul__(self, inputs):
        self.seen.setdefault(self.name, []).append(inputs)
        return inputs @ self.weight.T


class RecordingOracle(LlamaOracle):
    """The float64 Llama, which notes the inputs of each projection by module."""

    def _weight(self, name):
        weight = super()._weight(name)
        return Recorded(name, weight, self.seen) if "proj" in name else weight

    @property
    def seen(self):
        return self.__dict__.setdefault("_seen", {})


def with_outliers(tensors, rng):
    """Some channels a hundred times as large: of the norms, and of what goes into down."""
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight") or name.endswith("up_proj.weight"):
            changed[name] = tensor.copy()
            changed[name][rng.choice(len(tensor), 3, replace=False)] *= 100
    return changed


def measure(checkpoint, texts=TEXTS):
    mesh = mesh_of()
    return measure_inputs(load(checkpoint, "f32", mesh=mesh), mesh, CPU, texts)


# A channel of a single token may cancel to a thousandth of the others, with their f32 noise.
@pytest.mark.parametrize(
    ("texts", "noise"),
    [(TEXTS, 0.0), ([[17]], 1e-6), ([[17], [4]], 1e-6)],
    ids=["texts", "token", "tokens"],
)
def test_the_inputs_sizes_are_those_of_a_float64_model(rng, texts, noise):
    tensors = with_outliers(random_tensors(TINY, seed=8), rng)
    sizes = measure(InMemory(tensors), texts)
    oracle = RecordingOracle(TINY, tensors)
    for text in texts:
        oracle.logits(text)
    assert len(sizes) == 7
    num_compared = 0
    for name, measured in sizes.items():
        for layer in range(TINY.num_layers):
            inputs = np.concatenate(oracle.seen[name.replace("*", str(layer))])
            assert len(inputs) == sum(map(len, texts))
            expected = np.sqrt((inputs**2).mean(0))
            np.testing.assert_allclose(
                measured[layer], expected, rtol=1e-4, atol=noise * expected.max()
            )
            num_compared += 1
    assert num_compared == 14


@pytest.mark.parametrize("name", FAMILIES)
def test_no_logit_changes_in_any_family(name, rng, tmp_path):
    model = FAMILY_MODELS[name]
    path = write_family_hf(tmp_path / "model", model)
    plain = open_checkpoint(path)
    tensors = {key: plain.read(key) for key in plain.shapes}
    token_ids = model.token_ids()[:40]
    sizes = measure(plain, [token_ids.tolist()])
    # Sizes of any kind must do: what is multiplied here is divided there.
    sizes = {key: size * rng.uniform(0.1, 10, size.shape) for key, size in sizes.items()}
    smoothed = Smoothed(plain, sizes)
    changed = [key for key in tensors if not np.array_equal(smoothed.read(key), tensors[key])]
    first = changed[0]
    mixed = InMemory({**tensors, first: smoothed.read(first)}, plain.config)
    forward = Forward(path, "f32", 40)
    logits = [forward.logits(token_ids, [40])]
    for index, checkpoint in enumerate((smoothed, mixed)):
        folder = tmp_path / f"new{index}"
        write_checkpoint(checkpoint, (), surroundings_of(path, plain), folder)
        forward.use(folder)
        logits.append(forward.logits(token_ids, [40]))
    largest = np.abs(logits[0]).max()
    assert np.abs(logits[1] - logits[0]).max() < 2e-5 * largest
    # One of the changed tensors alone, without those that make up for it, is another model.
    assert np.abs(logits[2] - logits[0]).max() > 1e-3 * largest


def test_rounded_products_are_nearer_where_channels_are_outliers(rng):
    """As w8a8 multiplies: one scale a row of the weight, one a token."""
    tensors = with_outliers(random_tensors(TINY, seed=8), rng)
    oracle = RecordingOracle(TINY, tensors)
    for text in TEXTS:
        oracle.logits(text)
    smoothed = Smoothed(InMemory(tensors), measure(InMemory(tensors)))
    smooth = {key: np.asarray(smoothed.read(key), np.float64) for key in tensors}
    ratios = []
    for layer in range(TINY.num_layers):
        for module in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            inputs, weight = np.concatenate(oracle.seen[name]), tensors[f"{name}.weight"]
            columns = (smooth[f"{name}.weight"] / weight).mean(0)
            exact = inputs @ weight.astype(np.float64).T
            error = np.abs(w8a8(inputs, weight) - exact).mean()
            smooth_error = np.abs(w8a8(inputs / columns, smooth[f"{name}.weight"]) - exact).mean()
            ratios.append(smooth_error / error)
    # A quarter, mostly; how much is won depends on how far out the channels drawn lie.
    assert max(ratios) < 0.9
    assert np.median(ratios) < 0.45


def w8a8(inputs, weight):
    steps = np.abs(inputs).max(1, keepdims=True) / 127
    rounded = quantize(weight.astype(np.float32), parse_form("w8a8"))
    values = rounded.values.astype(np.float64) * rounded.scales
    return (np.round(inputs / steps) * steps) @ values.T


def test_channels_that_are_never_used_stay_finite():
    tensors = random_tensors(TINY, seed=8)
    for layer in range(TINY.num_layers):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, 3] = 0
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][5] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][:] = 0
    tensors["model.layers.0.self_attn.k_proj.weight"][:] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"][:] = 0
    sizes = measure(InMemory(tensors))
    sizes["model.layers.*.mlp.gate_proj"][1] = 0
    smoothed = Smoothed(InMemory(tensors), sizes)
    for name in tensors:
        assert np.isfinite(smoothed.read(name)).all()


def test_the_checkpoint_itself_is_not_changed_and_its_forms_are_left_out():
    config = replace(TINY, stored_forms=((EVERY_LAYER, "int8"),))
    tensors = random_tensors(TINY, seed=8)
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    stored = {
        name: quantize(tensor, parse_form("int8")) if "proj" in name else tensor
        for name, tensor in tensors.items()
    }
    sizes = measure(InMemory(tensors))
    smoothed = Smoothed(InMemory(stored, config), sizes)
    assert smoothed.config == TINY
    dequantized = Smoothed(
        InMemory(
            {n: t if isinstance(t, np.ndarray) else t.dequantize() for n, t in stored.items()}
        ),
        sizes,
    )
    for name in stored:
        read, expected = smoothed.read(name), dequantized.read(name)
        if "o_proj" not in name:
            np.testing.assert_array_equal(read, expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_an_unknown_family_is_named():
    config = replace(TINY, family="gpt2")
    with pytest.raises(ConfigError, match=r"'gpt2'.*llama"):
        Smoothed(InMemory(random_tensors(TINY), config), {})
