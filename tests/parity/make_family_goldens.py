"""Makes the goldens of the tiny models of every family: transformers' logits on torch, in f32.

    python -m tests.parity.make_family_goldens

transformers reads the folder that family_files.py writes. That each weight and each setting that
matters changes its logits is checked here, so that no golden agrees with a model that ignores one.
Runs where the `parity` extra is installed.
"""

import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.families import FAMILY_MODELS
from tests.family_files import write_family_hf
from tests.family_model import FamilyModel, Json
from tests.parity.family_changes import FAMILY_CHANGES, changed
from tests.parity.figures import MAX_LOGIT_DIFFERENCE
from tests.parity.tiny_models import checksum

GOLDENS = Path(__file__).parent / "goldens"

Model = transformers.PreTrainedModel


def main() -> None:
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    GOLDENS.mkdir(exist_ok=True)
    assert set(FAMILY_CHANGES) == set(FAMILY_MODELS)
    for name, tiny in FAMILY_MODELS.items():
        token_ids = tiny.token_ids()
        model = load(tiny, tiny.hf)
        logits = run(model, token_ids)
        effects = {str(change): 0.0 for change in FAMILY_CHANGES[name]}
        for change in FAMILY_CHANGES[name]:
            other = run(load(tiny, changed(tiny.hf, change)), token_ids)
            effects[str(change)] = float(np.abs(other - logits).max())
        for kind in weight_kinds(model):
            effects[kind] = float(np.abs(run_rolled(model, kind, token_ids) - logits).max())
        # run_rolled puts back what it moves.
        np.testing.assert_array_equal(run(model, token_ids), logits)
        smallest = min(effects, key=effects.__getitem__)
        print(
            f"{name}: logits {logits.shape}, std {logits.std():.2f}, of {len(effects)} changes the"
            f" least is {smallest}: {effects[smallest]:.3f}"
        )
        assert effects[smallest] > 10 * MAX_LOGIT_DIFFERENCE
        np.savez_compressed(
            GOLDENS / f"family-{name}.npz",
            token_ids=token_ids,
            logits=logits,
            checksum=np.array(checksum(tiny.tensors())),
        )


def load(tiny: FamilyModel, hf: Json) -> Model:
    """Has transformers read a folder of the model's weights and of this config.json."""
    with tempfile.TemporaryDirectory() as folder:
        write_family_hf(Path(folder), tiny, hf=hf)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    # The files hold two tensors of the vision part, which text does not pass through.
    missing = [key for key in report["missing_keys"] if not re.search("vision|multi_modal", key)]
    assert not missing, missing
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def weight_kinds(model: Model) -> list[str]:
    """Returns the language model's weights by name, with "*" for the layer's number."""
    names = [name for name, _ in model.named_parameters() if not re.search("vision|modal", name)]
    return list(dict.fromkeys(re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in names))


def run_rolled(model: Model, kind: str, token_ids: np.ndarray) -> np.ndarray:
    """Returns the logits with each weight of this kind moved on by one, its last going first."""
    pattern = re.escape(kind).replace(r"\*", r"\d+")
    weights = [p for name, p in model.named_parameters() if re.fullmatch(pattern, name)]
    assert weights
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(weight.roll(1, dims=-1))
    logits = run(model, token_ids)
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
    return logits


def run(model: Model, token_ids: np.ndarray) -> np.ndarray:
    """Returns f32 [T, V]."""
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    return model(ids, use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    main()
