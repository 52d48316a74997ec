"""Measures every family against transformers' logits, and every form on a real model, and writes
docs/models.md.

    python -m tests.parity.report [MODEL]

The logits of the tiny models are the goldens that make_family_goldens.py wrote; MODEL is a pulled
name or a file, by default smollm2-135m, whose f32 form is what its other forms are held against.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.forms import EVERY_LAYER, BaseForm, Rule
from pallasite.models.pull import locate
from pallasite.models.registry import FAMILIES, make_model
from pallasite.models.sharding import MeshShape
from pallasite.models.weights import num_bytes
from pallasite.pallas_kernels.target import CPU
from pallasite.server.__main__ import main as pallasite
from pallasite.server.flags import RULES
from tests.families import FAMILY_MODELS, FamilyModel
from tests.family_files import write_family_gguf, write_family_hf
from tests.parity.figures import Agreement, Scores, chunks_of
from tests.parity.forward import Forward
from tests.parity.test_parity import SCHEDULES, golden
from tests.parity.texts import TEXTS
from tests.parity.tiny_models import NUM_TOKENS

OUTPUT = Path(__file__).parents[2] / "docs" / "models.md"
CHUNK = 64
DEVICES = (2, 4, 8)
PUBLISHED = {
    "llama": "SmolLM2, Llama 3.x, Llama 2",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 (dense)",
    "gemma3": "Gemma 3, text",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "olmo2": "OLMo 2",
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One form of a model's weights and cache.

    Attributes:
        is_smoothed: whether `pallasite quantize --smooth` made it; else it is made while loading.
        down: that of the feed-forward's second matrix, where it has another.
        note: what a reader must know of its figures.
    """

    name: str
    base: BaseForm = "f32"
    form: str | None = None
    down: str | None = None
    has_int8_cache: bool = False
    is_smoothed: bool = False
    note: str = ""

    @property
    def rules(self) -> tuple[Rule, ...]:
        down = () if self.down is None else (("down_proj", self.down),)
        return () if self.form is None else (*down, (EVERY_LAYER, self.form))


KINDS = (
    Kind(name="f32"),
    Kind(name="bf16", base="bf16"),
    Kind(name="int8 cache", has_int8_cache=True),
    Kind(name="int8", form="int8"),
    Kind(name="int8:64", form="int8:64"),
    Kind(name="fp8", form="fp8"),
    Kind(name="w8a8", form="w8a8", note="a scale a row and a token, nothing else: not enough"),
    Kind(
        name="w8a8, smoothed",
        form="w8a8",
        is_smoothed=True,
        note="`pallasite quantize --rules w8a8 --smooth docs/architecture.md`",
    ),
    Kind(
        name="w8a8, smoothed, down by group",
        form="w8a8",
        down="w8a8:256",
        is_smoothed=True,
        note="the same with `--rules 'down_proj=w8a8:256;w8a8'`: recommended",
    ),
    Kind(name="w8a8:64", form="w8a8:64", note="scales by group, for targets whose dot takes them"),
    Kind(name="int4:32", form="int4:32", note="exact: the file itself has these groups (Q4_1)"),
    Kind(name="int4:16", form="int4:16", note="4-bit weights rounded again, to half the groups"),
    Kind(name="int4:64", form="int4:64", note="4-bit weights rounded again, to other groups"),
    Kind(name="int4:32, bf16, int8 cache", base="bf16", form="int4:32", has_int8_cache=True),
)


def main(model: str = "smollm2-135m") -> None:
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    lines = [_HEAD, *_family_table(), _FORMS, *_form_table(locate(model))]
    OUTPUT.write_text("\n".join(lines) + "\n")


def _family_table() -> list[str]:
    rows = [["family", "such as", "safetensors", "GGUF", *(f"{n} devices" for n in DEVICES)]]
    for family in FAMILIES:
        models = [m for m in FAMILY_MODELS.items() if m[1].config.family == family]
        hf = max(_difference(name, m, "safetensors") for name, m in models)
        ggufs = [_difference(name, m, "gguf") for name, m in models if m.has_gguf]
        shared = [
            max(_difference(name, m, "safetensors", num_devices) for name, m in models)
            for num_devices in DEVICES
        ]
        cells = [f"{x:.1e}" for x in (hf, *shared)]
        gguf = f"{max(ggufs):.1e}" if ggufs else "-"
        rows.append([f"`{family}`", PUBLISHED[family], cells[0], gguf, *cells[1:]])
    return _table(rows)


def _difference(name: str, tiny: FamilyModel, form: str, num_devices: int = 1) -> float:
    """The largest |difference of logits| by every schedule; on several devices by one."""
    expected = golden(f"family-{name}")["logits"]
    with tempfile.TemporaryDirectory() as folder:
        if form == "gguf":
            path = write_family_gguf(Path(folder) / "model.gguf", tiny)
        else:
            path = write_family_hf(Path(folder) / "model", tiny)
        model = Forward(path, "f32", NUM_TOKENS, mesh=MeshShape(model=num_devices))
    schedules = SCHEDULES.values() if num_devices == 1 else [SCHEDULES["prefill, then decode"]]
    largest = 0.0
    for chunks in schedules:
        logits = model.logits(tiny.token_ids(), chunks)
        assert np.isfinite(logits).all()
        largest = max(largest, float(np.abs(logits - expected).max()))
    print(f"{name} from {form} on {num_devices}: {largest:.1e}", flush=True)
    return largest


def _form_table(path: Path) -> list[str]:
    names = [
        "form",
        "perplexity",
        "change",
        "mean difference of log p",
        "top-1",
        "MB of weights",
        "note",
    ]
    rows = [names]
    reference: list[Scores] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            scores = _scores(_made(path, kind, Path(folder) / "made"), kind)
        reference = reference or scores
        agreement = Agreement.of(scores, reference)
        ours, theirs = _perplexity(scores), _perplexity(reference)
        rows.append(
            [
                kind.name,
                f"{ours:.3f}",
                f"{ours / theirs - 1:+.2%}",
                f"{agreement.logprob_difference:.4f}",
                f"{agreement.top_agreement:.2%}",
                f"{_megabytes(path, kind):.0f}",
                kind.note,
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return _table(rows)


def _made(path: Path, kind: Kind, folder: Path) -> Path:
    """Returns the model to load for a form, written to `folder` where it is not `path` itself."""
    if not kind.is_smoothed:
        return path
    text = OUTPUT.parent / "architecture.md"
    flags = ["--rules", RULES.show(kind.rules), "--smooth", str(text)]
    assert pallasite(["quantize", str(path), str(folder), *flags]) == 0
    return folder


def _scores(path: Path, kind: Kind) -> list[Scores]:
    cache = "int8" if kind.has_int8_cache else None
    rules = () if kind.is_smoothed else kind.rules
    model = Forward(path, kind.base, CHUNK, cache=cache, rules=rules)
    scores = []
    with np.load(Path(__file__).parent / "goldens" / "smollm2.npz") as tokens:
        for name in TEXTS:
            ids = tokens[f"{name}.token_ids"]
            scores.append(Scores.of(model.logits(ids, chunks_of(len(ids), CHUNK)), ids))
    return scores


def _perplexity(scores: Sequence[Scores]) -> float:
    return float(np.exp(-np.concatenate([each.logprobs for each in scores]).mean()))


def _megabytes(path: Path, kind: Kind) -> float:
    config = open_checkpoint(path).config
    return num_bytes(make_model(config, kind.base, CPU, rules=kind.rules)) / 1e6


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


_HEAD = f"""# Models and forms

Written by `make models` (`python -m tests.parity.report`); every figure is measured on a CPU, with
jax {jax.__version__}.

## Families

The largest |difference of logits| between Pallasite and transformers (torch, f32) over tiny random
models of each family, {NUM_TOKENS} tokens each, whose every setting and weight moves the logits by
more than 0.02: from a Hugging Face folder and from GGUF where llama.cpp has all of the family's
settings, in one go, in chunks, and token by token; then with 2, 4 and 8 devices sharing the model,
whose key heads some of these do not divide. The limit is 2e-3.
"""

_FORMS = """
## Forms of weights and cache

SmolLM2-135M-Instruct over 12 texts (1,165 scored tokens), held against its own f32 form.
`--quantize FORM` gives the layers' matrices a form, `--cache int8` the cache; the embedding, which
is the output head too, stays as it is: 113 MB of the megabytes in f32, half of that in bf16. The
model's file is 4-bit already (Q4_1, groups of 32): int4:32 holds its weights exactly, and says
nothing of how rounding floats to 4 bits would do; int4:64, which rounds 4-bit weights a second
time, shows what must not be done with them.
"""


if __name__ == "__main__":
    main(*sys.argv[1:])
