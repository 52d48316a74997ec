"""Writes a checkpoint as a Hugging Face folder, its matrices in the forms that rules choose.

Tensors are read, rounded and written one at a time, and config.json last: a folder that is not
finished is no checkpoint. What is in the folder beside weights and config.json, the tokenizer above
all, is the caller's to hand over.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.checkpoint_hf import read_json
from pallasite.models.checkpoint_pallasite import pallasite_parts, pallasite_settings
from pallasite.models.compressed_settings import can_hold, compressed_parts, compressed_settings
from pallasite.models.errors import ConfigError
from pallasite.models.forms import Form, Rule, check_rules, form_of, pattern_name
from pallasite.models.hf_settings import hf_settings
from pallasite.models.quantize import QuantizedTensor, Stored, checked_group, rounded
from pallasite.models.safetensors_write import ShardWriter

MAX_SHARD_BYTES = 2 * 10**9
TOKENIZER_GGUF = "tokenizer.gguf"
"""Has the tokenizer, and no tensors, in a folder that was made of a GGUF file."""

Progress = Callable[[int, int], None]
"""Called with the tensors written so far and those there are."""
COPIED_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", TOKENIZER_GGUF),
)
"""What `surroundings_of` takes from a folder, where it is there."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a folder has beside its weights.

    Attributes:
        settings: config.json's object; what it says of quantization is replaced.
        files: other files' bytes by name.
    """

    settings: Mapping[str, object]
    files: Mapping[str, bytes] = field(default_factory=dict)


def write_checkpoint(
    checkpoint: Checkpoint,
    rules: tuple[Rule, ...],
    surroundings: Surroundings,
    folder: Path,
    progress: Progress = lambda done, of: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint's tensors into a new folder.

    A matrix that no rule names stays in the form that it has. Where every quantized matrix is int8
    or fp8 the folder is in the format of compressed-tensors, which other engines read too, though
    not all of them inputs that are rounded by group (`w8a8:N`); 4-bit matrices have minimums that
    no such format has, and make it one of our own. Either is read back to the bit.

    Args:
        rules: patterns of names as `forms.form_of` takes them, and forms.
        max_shard_bytes: what a file may have at most, unless one tensor has more.

    Raises ConfigError for a rule that is wrong or names nothing, a group that does not divide, and
    a folder that is not empty or cannot be written to.
    """
    check_writable(checkpoint, rules, folder)
    forms = _choose(checkpoint, rules)
    quantized = {name: form for name, form in forms.items() if form and form.is_quantized}
    widths = {pattern_name(name): shape[-1] for name, shape in checkpoint.shapes.items()}
    is_compressed = all(can_hold(form, widths[name]) for name, form in quantized.items())
    if is_compressed:
        plain = [name for name in forms if name not in quantized]
        stated = compressed_settings(quantized, plain)
    else:
        stated = pallasite_settings(quantized)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(ShardWriter(folder, max_shard_bytes)) as shards:
            for index, name in enumerate(checkpoint.shapes):
                form = forms.get(pattern_name(name))
                tensor = _round(checkpoint.read(name), form)
                if isinstance(tensor, QuantizedTensor):
                    assert form is not None
                    module = name.removesuffix(".weight")
                    parts = (
                        compressed_parts(tensor, form) if is_compressed else pallasite_parts(tensor)
                    )
                    for part, array in parts.items():
                        shards.write(f"{module}.{part}", array)
                else:
                    shards.write(name, tensor)
                progress(index + 1, len(checkpoint.shapes))
            shards.finish()
        for file_name, content in surroundings.files.items():
            (folder / file_name).write_bytes(content)
        settings = {k: v for k, v in surroundings.settings.items() if k != "quantization_config"}
        if quantized:
            settings["quantization_config"] = stated
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_writable(checkpoint: Checkpoint, rules: tuple[Rule, ...], folder: Path) -> None:
    """Raises ConfigError as `write_checkpoint` would, as far as can be told before it writes."""
    forms = _choose(checkpoint, rules)
    for name, shape in checkpoint.shapes.items():
        if (form := forms.get(pattern_name(name))) is not None:
            checked_group(shape[-1], form)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"got the folder {folder.name!r}, which is not empty; a checkpoint needs a new one;"
                " choose another name"
            )
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"got the folder {folder.name!r}, which cannot be written to ({error.strerror}); it must be"
        " a new folder on a disk with room; choose another"
    )


def _choose(checkpoint: Checkpoint, rules: tuple[Rule, ...]) -> dict[str, Form | None]:
    """Returns the form of each matrix by its `pattern_name`; None for floats as they are."""
    check_rules(rules)
    names = [
        pattern_name(name)
        for name, shape in checkpoint.shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    ]
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"got the weight pattern {pattern!r}, which matches none of this model's matrices;"
                f" they are: {', '.join(dict.fromkeys(names))}; mend it or leave it out"
            )
    all_rules = (*rules, *checkpoint.config.stored_forms)
    return {name: form_of(name, all_rules) for name in names}


def _round(tensor: Stored, form: Form | None) -> Stored:
    if form is not None and form.is_quantized:
        return rounded(tensor, form)
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    if form is None:
        return tensor
    return tensor.astype(np.float32 if form.kind == "f32" else ml_dtypes.bfloat16)


def surroundings_of(path: Path, checkpoint: Checkpoint) -> Surroundings:
    """Returns what a folder written from an opened checkpoint gets beside its weights.

    A folder's own config.json is kept, unless its model is one part of several, and so are its
    tokenizer's files. A GGUF file has its tokenizer within and no such files: config.json is made
    from what was read, and the tokenizer's files have to come from elsewhere.

    Raises ConfigError for a model whose config.json cannot be made.
    """
    if not path.is_dir():
        return Surroundings(settings=hf_settings(checkpoint.config, checkpoint.shapes))
    settings = read_json(path / "config.json")
    if "text_config" in settings:
        settings = hf_settings(checkpoint.config, checkpoint.shapes)
    files = {}
    for name in COPIED_FILES:
        if (path / name).is_file():
            files[name] = (path / name).read_bytes()
    return Surroundings(settings=settings, files=files)
