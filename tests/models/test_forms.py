"""The rules that say in what form each weight is held: how they are read, what comes of them."""

import re
from dataclasses import replace

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import given

from pallasite.models.errors import ConfigError
from pallasite.models.forms import EVERY_LAYER, Form, check_rules, form_of, parse_form
from pallasite.models.registry import make_model
from pallasite.models.weights import Matrix, declared_weights, num_bytes
from pallasite.pallas_kernels.target import CPU, V6E
from tests.tiny_checkpoints import TINY

FORMS = {
    "f32": Form(kind="f32"),
    "bf16": Form(kind="bf16"),
    "fp8": Form(kind="fp8"),
    "int8": Form(kind="int8"),
    "int8:64": Form(kind="int8", group=64),
    "w8a8": Form(kind="int8", quantizes_inputs=True),
    "w8a8:64": Form(kind="int8", group=64, quantizes_inputs=True),
    "int4:2": Form(kind="int4", group=2),
    "int4:99998": Form(kind="int4", group=99998),
}
NAMES = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
IN_LAYERS = {f"model.layers.*.{name}" for name in NAMES}
ALL = {*IN_LAYERS, "model.embed_tokens", "lm_head"}


def matrices(base="bf16", target=V6E, num_parts=1, rules=(), config=TINY) -> dict[str, Matrix]:
    """The abstract model's matrices by the names that rules know them by."""
    weights = declared_weights(make_model(config, base, target, num_parts, rules))
    return {w.source.pattern_name: w for _, w in weights if isinstance(w, Matrix)}


def forms(*rules, **arguments):
    return {name: str(m.form) for name, m in matrices(rules=rules, **arguments).items()}


def assert_three_parts(message):
    """What we got, what is allowed, what to change."""
    assert re.fullmatch(r"got .{4,}[;:] .{4,}; (choose|mend) .+", message), message


@pytest.mark.parametrize("text", FORMS)
def test_a_form_and_its_text(text):
    assert parse_form(text) == FORMS[text]
    assert str(FORMS[text]) == text
    assert FORMS[text].is_quantized == (text not in ("f32", "bf16"))


def test_int4_has_groups_of_32_unless_it_says_others():
    assert parse_form("int4") == Form(kind="int4", group=32)
    assert str(parse_form("int4")) == "int4:32"


@pytest.mark.parametrize(
    "text",
    [
        *("q8", "INT8", "int16", "w4a4", "f32:32", "bf16:32", "fp8:", "fp8:32", ":32", "int8,8"),
        *("int8:", "int8:0", "int8:7", "int8:08", "int8:+8", "int8:-8", "int8:8.0", "int8:100000"),
        *("int8:8:8", "int8:\u00b2", "w8a8:x", "w8a8:3", "int4::", "int4:32:", "int4:\u0663\u0662"),
        *("", " ", " int8", "int8 ", "int8:\n8", "int8:8\n", "x" * 500),
    ],
)
def test_what_is_no_form_is_refused(text):
    with pytest.raises(ConfigError) as error:
        parse_form(text)
    message = str(error.value)
    assert_three_parts(message)
    assert message.startswith(f"got the weight form {text[:40]!r};")
    for name in ("f32", "bf16", "fp8", "int8", "w8a8", "int4"):
        assert name in message
    assert len(message) < 250


@given(
    st.text(max_size=12)
    | st.from_regex(r"(f32|bf16|fp8|int8|w8a8|int4|int)(:[0-9]{0,6})?", fullmatch=True)
)
def test_any_text_is_refused_or_means_what_it_says(text):
    try:
        form = parse_form(text)
    except ConfigError:
        return
    assert str(form) == ("int4:32" if text == "int4" else text)
    assert form.group is None or (form.group > 0 and form.group % 2 == 0)


def test_the_first_rule_that_matches_anywhere_in_the_name_counts():
    rules = [("gate", "int4:64"), (r"mlp\.", "int8"), (r"\.\*\.self", "fp8"), ("^lm", "w8a8")]
    form = {name: form_of(name, rules) for name in ALL}
    for name in ALL:
        expected = None
        if "gate" in name:
            expected = "int4:64"
        elif "mlp" in name:
            expected = "int8"
        elif "self_attn" in name:
            expected = "fp8"
        elif name == "lm_head":
            expected = "w8a8"
        assert form[name] == (expected and FORMS.get(expected, Form(kind="int4", group=64))), name
    assert form_of("lm_head", []) is None


def test_every_layer_means_all_but_the_embedding_and_the_head():
    assert {name for name in ALL if re.search(EVERY_LAYER, name)} == IN_LAYERS


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "(?P<x", "(" * 200])
def test_a_pattern_that_cannot_be_read_is_refused(pattern):
    rules = (("q_proj", "int8"), (pattern, "int8"))
    for refused in (
        lambda: check_rules(rules),
        lambda: make_model(TINY, "bf16", CPU, rules=rules),
        lambda: make_model(replace(TINY, stored_forms=rules), "bf16", CPU),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        message = str(error.value)
        assert_three_parts(message)
        assert message.startswith(f"got the weight pattern {pattern[:80]!r},")
        assert "regular expression" in message


def test_a_form_that_cannot_be_read_is_refused_wherever_its_rule_stands():
    rules = (("q_proj", "int8"), ("k_proj", "int9"))
    stored = replace(TINY, stored_forms=rules)
    for refused in (
        lambda: check_rules(rules),
        lambda: make_model(TINY, "bf16", CPU, rules=rules),
        lambda: make_model(stored, "bf16", CPU),
    ):
        with pytest.raises(ConfigError, match=r"^got the weight form 'int9'; allowed are "):
            refused()


def test_rules_without_fault_pass():
    check_rules([])
    check_rules([(EVERY_LAYER, "int8"), ("", "f32"), ("no such weight", "w8a8:32")])


def test_a_rule_that_matches_no_weight_is_refused_with_the_names_that_there_are():
    for rules in (
        (("q_porj", "int8"),),
        (("proj", "int8"), ("self_attn.bias", "int8")),
        (("^q_proj", "int8"), ("q_proj", "int8")),
    ):
        wrong = next(p for p, _ in rules if p in ("q_porj", "self_attn.bias", "^q_proj"))
        with pytest.raises(ConfigError) as error:
            matrices(rules=rules)
        message = str(error.value)
        assert_three_parts(message)
        assert message.startswith(f"got the weight pattern {wrong!r}, which matches none")
        listed = message.split(": ", 1)[1].split("; ")[0].split(", ")
        assert sorted(listed) == sorted(ALL)


def test_a_rule_for_a_head_that_is_tied_matches_nothing():
    with pytest.raises(ConfigError, match="'lm_head', which matches none"):
        matrices(rules=(("lm_head", "int8"),), config=replace(TINY, ties_embedding=True))


def test_a_rule_that_earlier_ones_leave_nothing_to_is_no_error():
    assert set(forms(("", "int8"), ("q_proj", "fp8")).values()) == {"int8"}


def test_the_operators_rules_come_before_those_of_the_checkpoint():
    stored = replace(
        TINY, stored_forms=(("q_proj", "int4:32"), ("k_proj", "int8:32"), ("no such weight", "fp8"))
    )
    form = forms(("q_proj", "int8"), ("lm_head", "w8a8"), config=stored)
    layer = "model.layers.*.self_attn."
    assert form.pop(layer + "q_proj") == "int8"
    assert form.pop(layer + "k_proj") == "int8:32"
    assert form.pop("lm_head") == "w8a8"
    assert set(form.values()) == {"bf16"}
    # An operator may ask for floats where the checkpoint has a quantized weight.
    assert set(forms(("", "f32"), config=stored).values()) == {"f32"}


@pytest.mark.parametrize("target", [CPU, V6E], ids=lambda target: target.name)
@pytest.mark.parametrize("base", ["f32", "bf16"])
@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_a_rule_for_floats_holds_them_so_whatever_the_others_are(base, form, target):
    held = matrices(base, target, rules=(("up_proj|lm_head", form),))
    stacked, whole = held["model.layers.*.mlp.up_proj"], held["lm_head"]
    bits = jnp.uint16 if target is CPU else jnp.bfloat16
    assert stacked.values.dtype == (jnp.float32 if form == "f32" else bits)
    assert whole.values.dtype == (jnp.float32 if form == "f32" else jnp.bfloat16)
    others = matrices(base, target)
    for name in ALL - {"model.layers.*.mlp.up_proj", "lm_head"}:
        assert held[name].values.dtype == others[name].values.dtype
    for matrix in (stacked, whole):
        assert matrix.dtype == {"f32": jnp.float32, "bf16": jnp.bfloat16}[form]
        assert matrix.scales is matrix.minimums is None


@pytest.mark.parametrize("target", [CPU, V6E], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("form", "dtype", "packs", "groups"),
    [
        ("int8", jnp.int8, 1, 1),
        ("int8:32", jnp.int8, 1, 4),
        ("w8a8", jnp.int8, 1, 1),
        ("w8a8:64", jnp.int8, 1, 2),
        ("fp8", jnp.float8_e4m3fn, 1, 1),
        ("int4:16", jnp.uint8, 2, 8),
        ("int4:128", jnp.uint8, 2, 1),
    ],
)
def test_what_a_quantized_matrix_is_made_of(form, dtype, packs, groups, target):
    L, D, F = TINY.num_layers, TINY.model_width, TINY.ffn_width
    name = "model.layers.*.mlp.down_proj"
    matrix = matrices("bf16", target, rules=(("down_proj", form),))[name]
    assert (matrix.values.shape, matrix.values.dtype) == ((L, D, F // packs), dtype)
    assert (matrix.scales.shape, matrix.scales.dtype) == ((L, D, groups), jnp.float32)
    assert matrix.dtype == jnp.bfloat16
    last = "ffn" if groups > 1 else "group"
    assert matrix.scales.get_metadata("axes") == ("layers", "width", last)
    assert matrix.values.get_metadata("axes") == matrix.axes == ("layers", "width", "ffn")
    if packs == 1:
        assert matrix.minimums is None
    else:
        assert (matrix.minimums.shape, matrix.minimums.dtype) == ((L, D, groups), jnp.float32)
        assert matrix.minimums.get_metadata("axes") == matrix.scales.get_metadata("axes")


def test_bytes_of_a_model_by_form():
    """Matrices of a layer alone: scales cost 4 bytes a row or group, minimums as much."""
    num_values = sum(
        m.values.size for name, m in matrices().items() if name.startswith("model.layers")
    )
    plain = num_bytes(make_model(TINY, "bf16", CPU))

    def saved(form):
        return plain - num_bytes(make_model(TINY, "bf16", CPU, rules=((EVERY_LAYER, form),)))

    assert saved("bf16") == 0
    assert saved("f32") == -2 * num_values
    assert saved("int8:32") == saved("w8a8:32") == num_values - 4 * num_values // 32
    assert saved("int4:32") == 2 * num_values - num_values // 2 - 8 * num_values // 32


@pytest.mark.parametrize("form", ["int8:48", "w8a8:128", "int4:10", "int4:99998"])
def test_groups_that_do_not_divide_the_inputs_are_refused(form):
    with pytest.raises(ConfigError) as error:
        matrices(rules=(("k_proj", form),))
    message = str(error.value)
    assert_three_parts(message)
    assert message.startswith(f"got the form {form} for model.layers.*.self_attn.k_proj,")
    assert "64 inputs" in message


def test_groups_must_divide_each_devices_part_of_heads():
    """The output projection has 64 inputs, 16 on each of 4 devices."""
    rules = (("o_proj", "int8:32"),)
    config = replace(TINY, num_kv_heads=4)
    assert forms(*rules, num_parts=2, config=config)["model.layers.*.self_attn.o_proj"] == "int8:32"
    with pytest.raises(ConfigError) as error:
        matrices(num_parts=4, rules=rules, config=config)
    message = str(error.value)
    assert_three_parts(message)
    assert "64 inputs over 4 devices" in message
    assert "must divide 16" in message
    # What is not cut along its inputs needs no more than its whole rows.
    matrices(num_parts=4, rules=(("q_proj", "int8:64"),), config=config)


def test_feed_forwards_are_padded_so_that_groups_stay_whole_on_every_device():
    """128 channels are four groups of 32; three devices get two groups each."""
    held = matrices(num_parts=3, rules=(("down_proj", "int4:32"),))
    down, up = (held[f"model.layers.*.mlp.{name}_proj"] for name in ("down", "up"))
    assert down.values.shape == (TINY.num_layers, TINY.model_width, 6 * 32 // 2)
    assert down.scales.shape == (TINY.num_layers, TINY.model_width, 6)
    # Those that make its inputs have as many channels.
    assert up.values.shape == (TINY.num_layers, 6 * 32, TINY.model_width)


def test_a_stored_form_whose_groups_do_not_divide_is_refused_too():
    stored = replace(TINY, stored_forms=(("v_proj", "int4:48"),))
    with pytest.raises(ConfigError, match=r"^got the form int4:48 for .*v_proj"):
        matrices(config=stored)
    # Unless the operator has the weight held otherwise.
    assert forms(("v_proj", "int8"), config=stored)["model.layers.*.self_attn.v_proj"] == "int8"


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_a_group_that_padding_alone_would_fit_is_refused_on_every_mesh(num_parts):
    """Rounding is in the model's own order, where 96 channels are no groups of 64."""
    config = replace(TINY, ffn_width=96)
    with pytest.raises(ConfigError, match=r"have 96 inputs; the group must divide 96; choose"):
        matrices(num_parts=num_parts, rules=(("down_proj", "int8:64"),), config=config)
