"""Writes a GGUF file's model as a Hugging Face folder in bf16, for engines that read no GGUF.

    python dequantized.py MODEL.gguf FOLDER

Runs in the environment of transformers, whose own reader dequantizes the weights. The rounding to
bf16 is what such an engine computes in.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, folder: str) -> None:
    path = Path(model)
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = read.config
    # It would say that the weights are still in the file's form.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
