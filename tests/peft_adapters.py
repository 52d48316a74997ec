"""Random LoRA adapters as PEFT writes them, and the same change merged into a model's weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class Peft:
    """An adapter of a model's tensors.

    Attributes:
        tensors: the model's, by Hugging Face name; those whose name has a target are adapted.
        gain: how large the change is beside the weights.
    """

    tensors: Mapping[str, np.ndarray]
    rank: int = 4
    alpha: float = 8.0
    targets: Sequence[str] = TARGETS
    seed: int = 0
    gain: float = 1.0
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.pairs = {}
        for name, tensor in self.tensors.items():
            if any(f".{target}.weight" in name for target in self.targets):
                out, inputs = tensor.shape
                size = self.gain * np.sqrt(tensor.std() / (self.scale * np.sqrt(self.rank)))
                a = size * rng.standard_normal((self.rank, inputs))
                b = size * rng.standard_normal((out, self.rank))
                self.pairs[name] = (a.astype(np.float32), b.astype(np.float32))

    @property
    def scale(self) -> float:
        if self.settings.get("use_rslora"):
            return self.alpha / self.rank**0.5
        return self.alpha / self.rank

    def merged(self) -> dict[str, np.ndarray]:
        """Returns the model's tensors with the adapter's change in them, in f32."""
        changed = dict(self.tensors)
        for name, (a, b) in self.pairs.items():
            change = self.scale * (b.astype(np.float64) @ a.astype(np.float64))
            changed[name] = (self.tensors[name] + change).astype(np.float32)
        return changed

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stored = {}
        for name, (a, b) in self.pairs.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            stored[f"{module}.lora_A.weight"] = a
            stored[f"{module}.lora_B.weight"] = b
        save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            **self.settings,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder
