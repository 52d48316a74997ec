"""A GGUF as a checkpoint: Hugging Face's names and order of rows, the config, named errors."""

from dataclasses import replace

import gguf
import numpy as np
import pytest

from pallasite.models.checkpoint_gguf import GgufCheckpoint, separate_halves
from pallasite.models.config import Llama3Rope
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_blocks import BLOCK_FORMS
from pallasite.models.gguf_file import GgufFile
from pallasite.models.gguf_rope import recover_rope_scaling, rope_divisors
from tests.models.gguf_bytes import (
    ARRAY,
    FLOAT32,
    STRING,
    UINT32,
    gguf_bytes,
    metadata,
    string,
    tensor,
)
from tests.tiny_checkpoints import (
    TINY,
    gguf_name,
    gguf_tokenizer,
    interleave_rows,
    llama3_divisors,
    random_tensors,
    write_gguf,
)

TENSORS = random_tensors(TINY, seed=7)
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
LLAMA3 = Llama3Rope(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_len=8192
)


class TestCheckpoint:
    @pytest.mark.parametrize("kind", WRITABLE)
    def test_names_shapes_config_and_order_of_rows(self, tmp_path, kind):
        tokenizer = gguf_tokenizer(TINY)
        checkpoint = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", TINY, TENSORS, kind, tokenizer))
        # Its tokens name one more end of a text than its settings do.
        config = checkpoint.config
        assert replace(config, block_forms=()) == replace(TINY, eos_token_ids=(258, 256))
        # A matrix of each name has a rule where its kind is one that a form holds exactly.
        rules = dict(config.block_forms)
        assert set(rules.values()) == ({BLOCK_FORMS[kind]} if kind in BLOCK_FORMS else set())
        if rules:
            assert r"^model\.layers\.\*\.mlp\.down_proj$" in rules
            assert not any("norm" in pattern for pattern in rules)
        assert dict(checkpoint.shapes) == {name: t.shape for name, t in TENSORS.items()}
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == tokenizer["tokenizer.ggml.tokens"]
        number = gguf.GGMLQuantizationType[kind]
        for name, expected in TENSORS.items():
            if kind != "F32" and expected.ndim == 2:
                # Quantizing goes by rows, so it does not depend on their order.
                stored = gguf.quants.quantize(expected, number)
                expected = gguf.quants.dequantize(stored, number)
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected)

    def test_without_an_output_head_the_embedding_is_tied(self, tmp_path):
        config = replace(TINY, ties_embedding=True, bos_token_id=None, eos_token_ids=(258, 256, 7))
        path = write_gguf(tmp_path / "x.gguf", config, random_tensors(config))
        checkpoint = GgufCheckpoint(path)
        assert checkpoint.config == config
        assert "lm_head.weight" not in checkpoint.shapes

    def test_a_tensor_it_does_not_know_keeps_its_name(self, tmp_path):
        path = tmp_path / "x.gguf"
        entries, tensors, data = tiny_parts()
        tensors.append(tensor("blk.0.attn_q.bias", (64,), 0, len(data)))
        path.write_bytes(gguf_bytes(entries, tensors, data + bytes(256)))
        checkpoint = GgufCheckpoint(path)
        assert set(checkpoint.shapes) - set(TENSORS) == {"blk.0.attn_q.bias"}
        with pytest.raises(CheckpointError, match="'nothing'"):
            checkpoint.read("nothing")

    @pytest.mark.parametrize("num_heads", [1, 2, 4])
    def test_separating_halves_undoes_interleaving(self, rng, num_heads):
        rows = rng.normal(size=(16 * num_heads, 3))
        read = interleave_rows(rows, num_heads)
        assert not np.array_equal(read, rows)
        np.testing.assert_array_equal(read[:3], rows[[0, 8, 1]])
        separate_halves(read, num_heads)
        np.testing.assert_array_equal(read, rows)


def tiny_parts() -> tuple[list[bytes], list[bytes], bytes]:
    """Metadata, tensor entries and data of a valid file of TINY, to be damaged one at a time."""
    numbers = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    entries = [metadata("general.architecture", STRING, "llama")]
    entries += [metadata(f"llama.{key}", UINT32, item) for key, item in numbers.items()]
    entries.append(metadata("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5))
    tensors, data = [], b""
    for name, stored in TENSORS.items():
        tensors.append(tensor(gguf_name(name), stored.shape[::-1], 0, len(data)))
        data += stored.tobytes()
    return entries, tensors, data


class TestContradictions:
    @pytest.mark.parametrize(
        ("key", "kind", "item", "named"),
        [
            ("general.architecture", STRING, "gpt2", "'gpt2'.*known are llama"),
            ("general.architecture", UINT32, 1, "general.architecture=1"),
            ("llama.block_count", UINT32, 3, "3 layers"),
            ("llama.block_count", UINT32, 2**31 - 1, "2147483647 layers"),
            ("llama.block_count", UINT32, 0, "llama.block_count=0"),
            ("llama.context_length", STRING, "many", "llama.context_length='many'"),
            ("llama.embedding_length", UINT32, 65, "llama.embedding_length=65.*64"),
            ("llama.vocab_size", UINT32, 321, "llama.vocab_size=321.*320"),
            ("llama.attention.head_count", UINT32, 2, "32 rows in tensor .*k_proj.*make 64"),
            ("llama.attention.head_count", UINT32, 3, "3 query heads"),
            ("llama.attention.head_count_kv", UINT32, 4, r"32 rows in tensor .*k_proj.*make 64"),
            ("llama.attention.head_count_kv", UINT32, 3, "3 key heads"),
            ("llama.attention.head_count_kv", ARRAY, (UINT32, [2, 2]), "a list"),
            ("llama.attention.key_length", UINT32, 32, r"64 rows in tensor .*q_proj.*make 128"),
            ("llama.attention.value_length", UINT32, 32, "value_length=32.*16"),
            ("llama.rope.dimension_count", UINT32, 8, "dimension_count=8.*16"),
            ("llama.rope.freq_base", FLOAT32, float("inf"), "freq_base=inf"),
            ("llama.rope.scaling.type", STRING, "yarn", "rope.scaling.type='yarn'"),
            ("llama.rope.scale_linear", FLOAT32, 2.0, "scale_linear=2.0"),
            ("llama.rope.scaling.factor", FLOAT32, 4.0, "scaling.factor=4.0"),
            ("llama.attention.sliding_window", UINT32, 128, "sliding_window=128"),
            ("llama.expert_count", UINT32, 8, "expert_count=8"),
            ("llama.tensor_data_layout", STRING, "other", "tensor_data_layout='other'"),
            ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 0.0, "rms_epsilon=0.0"),
            ("tokenizer.ggml.eos_token_id", UINT32, 320, "eos_token_id=320.*0 to 319"),
            ("tokenizer.ggml.bos_token_id", UINT32, 320, "bos_token_id=320"),
            ("tokenizer.ggml.eot_token_id", STRING, "x", "eot_token_id='x'"),
            ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"]), "2 entries.*320 rows"),
        ],
    )
    def test_metadata_that_cannot_be_is_named(self, tmp_path, key, kind, item, named):
        entries, tensors, data = tiny_parts()
        kept = [entry for entry in entries if not entry.startswith(string(key))]
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes([*kept, metadata(key, kind, item)], tensors, data))
        with pytest.raises(CheckpointError, match=named) as error:
            GgufCheckpoint(path)
        assert str(tmp_path) not in str(error.value)

    @pytest.mark.parametrize(
        "key",
        [
            "general.architecture",
            "llama.block_count",
            "llama.context_length",
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.attention.head_count",
            "llama.attention.layer_norm_rms_epsilon",
        ],
    )
    def test_metadata_that_is_missing_is_named(self, tmp_path, key):
        entries, tensors, data = tiny_parts()
        kept = [entry for entry in entries if not entry.startswith(string(key))]
        assert len(kept) == len(entries) - 1
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes(kept, tensors, data))
        with pytest.raises(CheckpointError, match=f"got no '{key}'"):
            GgufCheckpoint(path)

    def test_a_layer_that_is_missing(self, tmp_path):
        first = {name: t for name, t in TENSORS.items() if "layers.1." not in name}
        path = write_gguf(tmp_path / "x.gguf", TINY, first)
        with pytest.raises(CheckpointError, match="2 layers and tensors of 1, numbered 0 to 0"):
            GgufCheckpoint(path)

    def test_a_gap_between_layers(self, tmp_path):
        gap = {name.replace("layers.1.", "layers.2."): t for name, t in TENSORS.items()}
        path = write_gguf(tmp_path / "x.gguf", TINY, gap)
        with pytest.raises(CheckpointError, match="2 layers and tensors of 2, numbered 0 to 2"):
            GgufCheckpoint(path)

    def test_no_embedding(self, tmp_path):
        rest = {name: t for name, t in TENSORS.items() if "embed" not in name}
        with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
            GgufCheckpoint(write_gguf(tmp_path / "x.gguf", TINY, rest))

    def test_both_names_of_one_tensor(self, tmp_path):
        entries, tensors, data = tiny_parts()
        tensors.append(tensor("model.norm.weight", (64,), 0, len(data)))
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes(entries, tensors, data + bytes(256)))
        with pytest.raises(CheckpointError, match="under both"):
            GgufCheckpoint(path)


class TestDamage:
    @pytest.mark.parametrize("kind", ["F32", "Q8_0"])
    def test_a_file_cut_short_after_it_was_opened_names_the_tensor(self, tmp_path, kind):
        path = write_gguf(tmp_path / "x.gguf", TINY, TENSORS, kind)
        checkpoint = GgufCheckpoint(path)
        path.write_bytes(path.read_bytes()[:-64])
        with pytest.raises(CheckpointError, match=r"bytes in tensor 'output\.weight'"):
            checkpoint.read("lm_head.weight")

    def test_400_damaged_files_give_checkpoint_errors_only(self, tmp_path, rng):
        path = write_gguf(tmp_path / "x.gguf", TINY, TENSORS, "Q8_0", gguf_tokenizer(TINY))
        whole = path.read_bytes()
        header_bytes = min(place.offset for place in GgufFile(path).tensors.values())
        num_refused = 0
        for trial in range(400):
            content = bytearray(whole)
            if trial % 4 == 0:
                # The end is padding: what is cut off reaches the last tensor from 32 bytes on.
                content = content[: rng.integers(len(whole) - 32)]
            else:
                for _ in range(rng.integers(1, 4)):
                    content[rng.integers(header_bytes)] = rng.integers(256)
            path.write_bytes(content)
            try:
                checkpoint = GgufCheckpoint(path)
                for name in checkpoint.shapes:
                    checkpoint.read(name)
            except CheckpointError:
                num_refused += 1
        assert num_refused >= 100


class TestRopeScaling:
    @pytest.mark.parametrize("head_width", [64, 128])
    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_llama_3_is_found_as_it_was(self, head_width, factor):
        scaling = replace(LLAMA3, factor=factor)
        divisors = llama3_divisors(scaling, head_width, 500_000.0)
        assert recover_rope_scaling(divisors, 500_000.0) == scaling

    def test_it_is_read_from_the_file(self, tmp_path):
        config = replace(TINY, head_width=64, rope_theta=500_000.0, rope_scaling=LLAMA3)
        path = write_gguf(tmp_path / "x.gguf", config, random_tensors(config))
        checkpoint = GgufCheckpoint(path)
        assert checkpoint.config == config
        assert "rope_freqs.weight" not in checkpoint.shapes

    def test_ours_and_metas_wording_agree(self):
        ours = rope_divisors(LLAMA3, 128, 500_000.0)
        np.testing.assert_allclose(ours, llama3_divisors(LLAMA3, 128, 500_000.0), rtol=1e-6)
        assert (ours == 1.0).sum() > 5
        assert (ours == 8.0).sum() > 5
        assert ((ours > 1.0) & (ours < 8.0)).sum() > 5

    def test_any_other_scaling_comes_back_as_one_that_does_the_same(self, rng):
        num_blended = []
        for _ in range(300):
            head_width = int(rng.choice([8, 16, 64, 128]))
            rope_theta = float(rng.choice([1e4, 5e5]))
            low = float(rng.uniform(0.5, 4.0))
            scaling = Llama3Rope(
                factor=float(rng.uniform(1.5, 40.0)),
                low_frequency_factor=low,
                high_frequency_factor=low * float(rng.uniform(1.2, 20.0)),
                original_context_len=int(rng.integers(64, 4096)),
            )
            divisors = llama3_divisors(scaling, head_width, rope_theta)
            if not (divisors[0] == 1.0 and divisors[-1] == np.float32(scaling.factor)):
                continue
            found = recover_rope_scaling(divisors, rope_theta)
            made = rope_divisors(found, head_width, rope_theta)
            np.testing.assert_allclose(made, divisors, rtol=3e-5)
            num_blended.append(int(((divisors > 1.0) & (divisors < scaling.factor)).sum()))
        assert {0, 1, 2} <= set(num_blended)

    def test_all_ones_are_no_scaling(self):
        assert recover_rope_scaling(np.ones(32, np.float32), 1e4) is None

    @pytest.mark.parametrize(
        "divisors",
        [
            np.full(32, 4.0),
            np.zeros(32),
            np.linspace(0.5, 4.0, 32),
            np.linspace(1.0, 4.0, 32),
            np.linspace(4.0, 1.0, 32),
            np.tile([1.0, 8.0], 16),
        ],
    )
    def test_other_factors_are_refused(self, divisors):
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
            recover_rope_scaling(divisors.astype(np.float32), 1e4)

    def test_factors_of_another_width_are_refused(self, tmp_path):
        entries, tensors, data = tiny_parts()
        tensors.append(tensor("rope_freqs.weight", (16,), 0, len(data)))
        path = tmp_path / "x.gguf"
        path.write_bytes(gguf_bytes(entries, tensors, data + bytes(64)))
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight' of shape .16,.; .*.8,."):
            GgufCheckpoint(path)


def test_the_real_model(real_model_path):
    """SmolLM2-135M: its sizes and tokens."""
    checkpoint = GgufCheckpoint(real_model_path)
    num_numbers = sum(checkpoint.read(name).size for name in checkpoint.shapes)
    assert num_numbers == 134_515_008
    assert len(checkpoint.shapes) == 272
    config = checkpoint.config
    assert (config.num_layers, config.model_width, config.vocab_size) == (30, 576, 49152)
    assert (config.num_query_heads, config.num_kv_heads, config.head_width) == (9, 3, 64)
    assert (config.norm_epsilon, config.rope_theta) == (1e-5, 1e5)
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 0), 1)
    assert config.ties_embedding
