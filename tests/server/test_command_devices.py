"""Meshes, forms of weights and of the cache from the command line, where a user has set no flags.

What needs devices runs in a process of its own: the tests' has eight of them by its environment.
"""

import json
import re

import pytest

from pallasite.engine import deployment
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels.target import TARGETS, target_of
from tests.engine.harness import lively_tensors
from tests.server.commands import pallasite_alone
from tests.tiny_checkpoints import TINY, write_hf

ASK = ("--prompt", "Hello", "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("models") / "tiny", TINY, lively_tensors())


@pytest.fixture(scope="module")
def flags(compile_cache):
    line = "--weights f32 --max-requests 4 --max-context-len 64 --max-batch-tokens 16"
    return [*line.split(), "--compile-cache", str(compile_cache)]


def tokens(result):
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)["completions"]
    return answer["token_ids"]


def test_a_cpu_becomes_the_mesh_that_is_asked_for(model, flags):
    """Four devices where nothing says that there are any, and one device's tokens."""
    mesh = ["--mesh", "data=2,model=2"]
    one = pallasite_alone("info", model, *flags, "--json")
    four = pallasite_alone("info", model, *flags, *mesh, "--json")
    facts = [json.loads(result.stdout) for result in (one, four)]
    assert [fact["target"]["num_devices"] for fact in facts] == [1, 4]
    assert [fact["model"]["mesh"] for fact in facts] == ["data=1,model=1", "data=2,model=2"]
    expected = tokens(pallasite_alone("generate", model, *ASK, *flags))
    assert len(set(expected)) > 3, "a model that says one word again and again proves little"
    assert tokens(pallasite_alone("generate", model, *ASK, *flags, *mesh)) == expected


@pytest.mark.parametrize("mesh", ["data=300", "model=300", "data=3000000000", "model=3000000000"])
def test_a_mesh_beyond_what_a_cpu_is_cut_into_is_refused(model, flags, mesh):
    size = mesh.partition("=")[2]
    line = ["--max-requests", 2 * int(size), "--max-batch-tokens", 4 * int(size), "--mesh", mesh]
    result = pallasite_alone("info", model, *flags, *line)
    assert result.returncode == 2
    assert f"which needs {size} devices; there are 256: allowed are data=256,model=1 or" in (
        result.stderr
    )
    assert result.stderr.startswith("pallasite: got the mesh ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mesh 4", "got --mesh '4'; allowed is as in data=2,model=4; see `pallasite generate"),
        ("--mesh data=2,data=2", "got --mesh 'data=2,data=2'; allowed is as in data=2,model=4;"),
        ("--mesh tensor=2", "got --mesh 'tensor=2'; allowed is as in data=2,model=4;"),
        ("--mesh data=x", "got --mesh 'data=x'; allowed is as in data=2,model=4;"),
        ("--mesh data=", "got --mesh 'data='; allowed is as in data=2,model=4;"),
        ("--mesh data=0", "got a mesh with data=0; each axis has at least 1 device; raise it"),
        ("--mesh model=-1", "got a mesh with model=-1; each axis has at least 1 device; raise it"),
        ("--mesh data=3", "got max_requests=4; it must be at least 6; raise it"),
        ("--mesh data=2 --max-requests 5", "got max_requests=5 for 2 data shards, which share it"),
        ("--mesh data=4,model=4 --max-requests 8", "got the mesh data=4,model=4, which needs 16"),
        ("--quantize int5", "got the weight form 'int5'; allowed are f32, bf16, fp8, q4_1, q8_0"),
        ("--quantize int4:3", "got the weight form 'int4:3'; allowed are f32, bf16, fp8, q4_1, q8"),
        ("--quantize mlp=", "got the weight form ''; allowed are f32, bf16, fp8, q4_1, q8_0"),
        ("--quantize mpl=int8", "got the weight pattern 'mpl', which matches none of this model's"),
        ("--quantize (=int8", "got the weight pattern '(', which is no regular expression"),
        ("--quantize int4:48", "got the form int4:48 for model.layers.*."),
        ("--cache int4", "got --cache 'int4'; allowed is auto or int8 or fp8; see"),
        ("--cache fp8", "got cache='fp8' for cpu, which does not multiply fp8; allowed"),
    ],
)
def test_bad_values_end_with_status_2(run, model, flags, line, message):
    result = run("generate", model, "--prompt", "x", *flags, *line.split())
    assert result.status == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith(f"pallasite: {message}")
    assert result.err.count("; ") >= 2


@pytest.mark.parametrize("command", ["info", "info MODEL", "generate", "serve", "quantize"])
def test_a_device_that_nothing_is_compiled_for_ends_with_status_2(
    run, model, flags, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(deployment, "target_of", lambda *_: target_of("tpu", "TPU v4"))
    text = tmp_path / "text"
    text.write_text("crystals of olivine " * 60)
    result = {
        "info": lambda: run("info"),
        "info MODEL": lambda: run("info", model, *flags),
        "generate": lambda: run("generate", model, "--prompt", "x", *flags),
        "serve": lambda: run("serve", model, "--port", "0", *flags),
        "quantize": lambda: run(
            "quantize", model, tmp_path / "out", "--rules", "w8a8", "--smooth", text
        ),
    }[command]()
    assert result.status == 2
    assert result.err.splitlines()[-1] == (
        f"pallasite: got a device 'TPU v4' of platform 'tpu'; known are {', '.join(TARGETS)};"
        " take a machine with one of them, or set JAX_PLATFORMS=cpu to use its CPU"
    )


def num_bytes(num_devices, value_bytes, has_scales):
    """The bytes of TINY's weights on one of the devices that share it, worked out by hand.

    `value_bytes` is what a value of a layer's matrix takes. Scales are f32, one a row: rows are
    shared but those of the two matrices whose inputs are, which each device scales whole.
    """
    width, ffn, vocab = TINY.model_width, TINY.ffn_width, TINY.vocab_size
    keys = TINY.num_kv_heads * TINY.head_width
    values = width * width + 2 * keys * width + width * width + 3 * ffn * width
    layer = values * value_bytes / num_devices + 4 * 2 * width
    if has_scales:
        layer += 4 * (width + 2 * keys + 2 * ffn) / num_devices + 4 * 2 * width
    return TINY.num_layers * layer + 4 * width + 2 * 4 * vocab * width / num_devices


@pytest.mark.parametrize(
    "mesh", [MeshShape(model=2), MeshShape(data=2, model=2), MeshShape()], ids=str
)
@pytest.mark.parametrize(("form", "value_bytes"), [("f32", 4), ("int8", 1), ("fp8", 1)])
def test_info_tells_what_each_device_holds(run, model, flags, mesh, form, value_bytes):
    line = [] if mesh == MeshShape() else ["--mesh", mesh]
    line += ["--cache-tokens", "128", "--quantize", form]
    result = run("info", model, *flags, *line, "--json")
    memory = json.loads(result.out)["memory"]
    expected = num_bytes(mesh.model, value_bytes, has_scales=form != "f32")
    assert memory["device_weights_bytes"] == expected
    token_bytes = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_width * 4
    assert memory["cached_token_bytes"] == token_bytes
    assert memory["device_cache_bytes"] == 128 * token_bytes / mesh.num_devices
    shown = run("info", model, *flags, *line).out
    assert re.search(rf"device weights bytes +{re.escape(as_shown(expected))}\n", shown)
    assert re.search(rf"  mesh +{mesh}\n", shown)


def test_info_tells_the_form_of_each_matrix(run, model, flags, tmp_path):
    """By the flags, and by a checkpoint that is quantized; what nothing names has --weights."""
    forms = {
        **dict.fromkeys(("model.embed_tokens", "lm_head"), "f32"),
        **{f"model.layers.*.self_attn.{x}_proj": "int8" for x in "qkvo"},
        **{f"model.layers.*.mlp.{x}_proj": "int4:16" for x in ("gate", "up", "down")},
    }
    rules = "mlp=int4:16;self_attn=int8"
    folder = tmp_path / "new"
    assert run("quantize", model, folder, "--rules", rules).status == 0
    for line in ([model, "--quantize", rules, "--cache", "int8"], [folder]):
        facts = json.loads(run("info", *line, *flags, "--json").out)["model"]
        assert facts["weight_forms"] == forms
        assert facts["weights"] == "f32"
        assert facts["cache"] == ("int8" if "--cache" in line else "f32")
        shown = run("info", *line, *flags).out
        assert re.search(rf"  cache +{facts['cache']}\n", shown)
        row = re.search(r"  weight forms +(.*)\n", shown)[1].split("; ")
        named = [
            (name, form)
            for form, names in (part.rsplit(": ", 1) for part in row)
            for name in names.split(", ")
        ]
        assert sorted(named) == sorted(forms.items())


def as_shown(count):
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{int(count):,} bytes"


def test_info_tells_what_a_cache_of_int8_saves(run, model, flags):
    """A key or a value of one head is 16 bytes and a scale of four."""
    line = ["--cache-tokens", "128", "--json"]
    whole, int8 = (
        json.loads(run("info", model, *flags, *line, "--cache", form).out)["memory"]
        for form in ("auto", "int8")
    )
    rows = 2 * TINY.num_layers * TINY.num_kv_heads
    assert whole["cached_token_bytes"] == rows * 4 * TINY.head_width
    assert int8["cached_token_bytes"] == rows * (TINY.head_width + 4)
    assert int8["cache_bytes"] == 128 * int8["cached_token_bytes"]


def test_info_tells_what_a_mesh_pads(run, model, flags):
    line = ["--mesh", "model=3", "--max-context-len", "64", "--json"]
    result = run("info", model, *flags, *line)
    assert result.status == 0, result.err
    layout = json.loads(result.out)["memory"]["layout"]
    assert "320 rows of the vocabulary are padded to 321 for 3 devices" in layout
    even = json.loads(run("info", model, *flags, "--json").out)
    assert even["memory"]["layout"] == "even"


def test_quantized_forms_and_an_int8_cache_generate(run, model, flags):
    """Each form is another model: near enough to answer, not so near that nothing was rounded."""
    scores = {}
    for name, line in {
        "f32": [],
        "forms": ["--quantize", "mlp=int4:16;self_attn=int8"],
        "cache": ["--cache", "int8"],
    }.items():
        more = ["--prompt-logprobs", "0", *line]
        result = run("generate", model, *ASK, *flags, *more)
        assert result.status == 0, result.err
        (answer,) = json.loads(result.out)["completions"]
        scores[name] = [place["logprob"] for place in answer["prompt_logprobs"][1:]]
    for name in ("forms", "cache"):
        gaps = [abs(a - b) for a, b in zip(scores["f32"], scores[name], strict=True)]
        assert 1e-4 < max(gaps) < 2.0, (name, gaps)
