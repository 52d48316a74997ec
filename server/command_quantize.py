"""`pallasite quantize`: writes a checkpoint with its weights in the forms that rules choose."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import jax

from pallasite.engine.deployment import target_for
from pallasite.engine.planner import memory_limit
from pallasite.models.calibration import measure_inputs
from pallasite.models.checkpoint import Checkpoint, open_checkpoint
from pallasite.models.checkpoint_write import (
    TOKENIZER_GGUF,
    check_writable,
    surroundings_of,
    write_checkpoint,
)
from pallasite.models.errors import ConfigError
from pallasite.models.loader import load_weights
from pallasite.models.pull import locate
from pallasite.models.registry import make_model
from pallasite.models.sharding import MeshShape, make_mesh
from pallasite.models.smoothing import Smoothed
from pallasite.models.weights import num_bytes, placed
from pallasite.server.command_evaluate import cut, read_text
from pallasite.server.progress import progress_printer
from pallasite.server.tokenizer import load_tokenizer

_WINDOW = 512
"""Tokens that smoothing's text is cut into, where the model's context is not shorter."""


def quantize(args: argparse.Namespace) -> int:
    """Writes OUT. Raises ConfigError for a rule, a text or a folder that cannot be."""
    path, progress = locate(args.model), progress_printer()
    source: Checkpoint = open_checkpoint(path)
    surroundings = surroundings_of(path, source)
    # Before a text is run, which takes long.
    check_writable(source, args.rules, args.out)
    if not path.is_dir():
        files = {**surroundings.files, TOKENIZER_GGUF: _tokenizer_of(path)}
        surroundings = replace(surroundings, files=files)
    if args.smooth is not None:
        progress("measuring the inputs of the matrices on the text")
        source = _smoothed(path, source, args.smooth)
    total = len(source.shapes)

    def show(done: int, of: int) -> None:
        if done % max(1, total // 10) == 0 or done == of:
            progress(f"wrote {done} of {of} tensors")

    write_checkpoint(source, args.rules, surroundings, args.out, show)
    progress(f"{args.out.name} is written")
    return 0


def _smoothed(path: Path, checkpoint: Checkpoint, text: Path) -> Checkpoint:
    window = min(_WINDOW, checkpoint.config.context_len)
    windows = cut(read_text(text, "--smooth"), load_tokenizer(path), window)
    device = jax.devices()[0]
    target, mesh = target_for(device), make_mesh(MeshShape(), [device])
    model = placed(make_model(checkpoint.config, "f32", target), mesh)
    needed, limit = num_bytes(model), memory_limit(device)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"got --smooth for a model of {needed / 1e9:.1f} GB in f32, in which the text is run;"
            f" {limit / 1e9:.1f} GB are free on {device.platform}; leave --smooth out, or take a"
            " machine with more memory"
        )
    sizes = measure_inputs(load_weights(model, checkpoint, mesh), mesh, target, windows)
    return Smoothed(checkpoint, sizes)


def _tokenizer_of(source: Path) -> bytes:
    """Returns a GGUF's tokenizer, as it says it, as a GGUF file without tensors.

    The architecture is the source's: some of what a tokenizer does is known by it alone.
    """
    reader = gguf.GGUFReader(source)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / TOKENIZER_GGUF
        writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if name.startswith("tokenizer."):
                kinds = field.types
                item = kinds[-1] if kinds[0] is gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kinds[0], item)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return output.read_bytes()
