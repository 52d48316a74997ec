"""`pallasite quantize`: writes a checkpoint with its weights in the forms that rules choose."""

import argparse
from pathlib import Path

import gguf
import jax

from pallasite.models.calibration import measure_inputs
from pallasite.models.checkpoint import Checkpoint, open_checkpoint
from pallasite.models.checkpoint_write import surroundings_of, write_checkpoint
from pallasite.models.loader import load_weights
from pallasite.models.pull import locate
from pallasite.models.registry import make_model
from pallasite.models.sharding import MeshShape, make_mesh
from pallasite.models.smoothing import Smoothed
from pallasite.models.weights import placed
from pallasite.pallas_kernels.target import TARGETS
from pallasite.server.command_evaluate import cut, read_text
from pallasite.server.progress import progress_printer
from pallasite.server.tokenizer import TOKENIZER_GGUF, load_tokenizer

_WINDOW = 512
"""Tokens that smoothing's text is cut into."""


def quantize(args: argparse.Namespace) -> int:
    """Writes OUT. Raises ConfigError for a rule, a text or a folder that cannot be."""
    path, progress = locate(args.model), progress_printer()
    source: Checkpoint = open_checkpoint(path)
    surroundings = surroundings_of(path, source)
    if args.smooth is not None:
        progress("measuring the inputs of the matrices on the text")
        source = _smoothed(path, source, args.smooth)
    total = len(source.shapes)

    def show(done: int, of: int) -> None:
        if done % max(1, total // 10) == 0 or done == of:
            progress(f"wrote {done} of {of} tensors")

    write_checkpoint(source, args.rules, surroundings, args.out, show)
    if not path.is_dir():
        _write_tokenizer(path, args.out / TOKENIZER_GGUF)
    progress(f"{args.out.name} is written")
    return 0


def _smoothed(path: Path, checkpoint: Checkpoint, text: Path) -> Checkpoint:
    windows = cut(read_text(text, "--smooth"), load_tokenizer(path), _WINDOW)
    device = jax.devices()[0]
    target, mesh = TARGETS[device.platform], make_mesh(MeshShape(), [device])
    model = placed(make_model(checkpoint.config, "f32", target), mesh)
    sizes = measure_inputs(load_weights(model, checkpoint, mesh), mesh, target, windows)
    return Smoothed(checkpoint, sizes)


def _write_tokenizer(source: Path, output: Path) -> None:
    """Keeps a GGUF's tokenizer, as it says it, in a GGUF file without tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, "tokenizer")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kinds = field.types
            item = kinds[-1] if kinds[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
