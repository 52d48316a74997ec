"""Small vocabularies of both kinds, as the metadata of a GGUF file, for tests of text."""

from tokenizers.pre_tokenizers import ByteLevel

from pallasite.server.tokenizer import Tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level_metadata(pre: str = "gpt-2") -> dict[str, object]:
    """256 bytes and a few merges, the specials in front."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ã ©", "i m", "i n", "< |"]
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<think>"],
        "tokenizer.ggml.token_type": [
            *[CONTROL] * len(SPECIALS),
            *[NORMAL] * (len(tokens) - len(SPECIALS)),
            USER_DEFINED,
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": SPECIALS.index("<s>"),
        "tokenizer.ggml.eos_token_id": SPECIALS.index("<|im_end|>"),
        "tokenizer.ggml.eot_token_id": SPECIALS.index("<|eot_id|>"),
    }


def sentencepiece_metadata() -> dict[str, object]:
    """256 byte pieces, letters, and pieces joined of them."""
    letters = "\u2581abcdehlorst.é<>/|_[]IN\n"
    pieces = [
        "he",
        "ll",
        "hell",
        "hello",
        "\u2581hello",
        "lo",
        "\u2581a",
        "ab",
        "abc",
        "st",
        "\u2581\u2581",
    ]
    tokens = [
        "<unk>",
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        *letters,
    ]
    types = [UNKNOWN, *[CONTROL] * len(SPECIALS), *[BYTE] * 256]
    types += [NORMAL] * (len(tokens) - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        # The later, the better, against the order that merges would have by themselves.
        "tokenizer.ggml.scores": [float(i) for i in range(len(tokens))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }


def byte_level() -> Tokenizer:
    return Tokenizer(build_from_gguf(byte_level_metadata()))


def sentencepiece() -> Tokenizer:
    return Tokenizer(build_from_gguf(sentencepiece_metadata()))
