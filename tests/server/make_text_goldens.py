"""Makes goldens/text.json: token ids of tiny vocabularies by code that is not ours.

    python -m tests.server.make_text_goldens

Vocabularies are trained here, on text made here. SentencePiece's come with the ids of the
`sentencepiece` package, and their chats with those of transformers' slow tokenizers, which split at
special tokens in Python, and of Mistral's own library, which knows no template. The byte-level one
comes with the ids of `tiktoken`, by the expressions that its families published. Nothing of ours
is needed; it runs where these are installed:

    pip install sentencepiece "transformers<5" tiktoken mistral_common tokenizers
"""

import base64
import io
import json
import random
import tempfile
from pathlib import Path
from unittest import mock

import mistral_common
import sentencepiece
import tiktoken
import tokenizers
import transformers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import sentencepiece_model_pb2
from tiktoken_ext import openai_public
from tokenizers import models, pre_tokenizers, trainers
from transformers.models.qwen2 import tokenization_qwen2

GOLDENS = Path(__file__).parent / "goldens" / "text.json"

SENTENCE = """
the token of a word that follows another is joined by its score and never by its order in the file
so a reader who looks for one finds two where three were hello world stone iron metal crystal
naïve café größer привет мир 数学 は 楽しい def return class self import print
"""
WORDS = SENTENCE.split()
MISTRAL_CONTROLS = [
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
]
TRAPS = [
    *("", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "a", " a", "a ", "  a", "a  b", "hello"),
    *("\u2581", "\u2581a", "a\u2581b", "<s>", "</s>", "<unk>", "<0x41>", "<table>", "</table>"),
    *("[INST] hello [/INST]", "<pad>", "<unused0>", "a\0b", "e\u0301", "é", "ß", "ﬁ", "½²"),
    *("\ufeffa", "\u200b", "\u00a0x", "\u3000x", "🙂", "👩\u200d👩\u200d👧", "\U00040000", "हिन्दी"),
    *(
        "'\u017f",
        "Don't WE'LL i'Ve they're",
        "HTTPServer camelCase XMLÉtat",
        "1 12 123 1234 12345 3.14 ٣٤٥",
    ),
    *("x=1;\ny = x**2  # twice", "a/b//c/\n\n/d", "!!!...???\n", "?\r\n\r\n  x", "a\u0308O\u0308"),
]


def sentences(rng: random.Random, num_lines: int) -> list[str]:
    """Lines of words, numbers and code, indented as code is."""
    lines = []
    for _ in range(num_lines):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(2, 9))]
        if rng.random() < 0.3:
            words.append(str(rng.randrange(10**5)))
        lines.append(" " * rng.choice((0, 0, 1, 4, 8, 12, 16, 31)) + " ".join(words))
    return lines


def texts(rng: random.Random) -> list[str]:
    runs = [f"{c * n}{end}" for c in "\na=" for n in (5, 17, 33) for end in ("", "x")]
    runs += [f"{' ' * n}x" for n in range(3, 41)]
    fragments = [
        *TRAPS,
        *WORDS,
        "  ",
        "    ",
        "\n",
        "<table>",
        "1234",
        "abab",
        "aaa",
        "\u2581\u2581",
    ]
    mixed = ["".join(rng.choices(fragments, k=rng.randrange(2, 9))) for _ in range(70)]
    pairs = ["".join(rng.choices("ab ", k=rng.randrange(3, 28))) for _ in range(40)]
    return [*TRAPS, *runs, *mixed, *pairs]


def train(lines: list[str], **settings: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "byte_fallback": True,
            "split_digits": True,
            "num_threads": 1,
            "minloglevel": 2,
            "self_test_sample_size": 0,
        }
        | settings,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("input")
    proto.trainer_spec.ClearField("model_prefix")
    return proto.SerializeToString(deterministic=True)


def with_equal_runs(proto: bytes) -> bytes:
    """Gives every run of spaces one score, as in Mistral's model, and ids in no order of length."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    places = [i for i, piece in enumerate(model.pieces) if set(piece.piece) == {"\u2581"}]
    assert len(places) == 16
    runs = ["\u2581" * (7 * i % 17) for i in range(1, 17)]
    for i, run in zip(places, runs, strict=True):
        model.pieces[i].piece, model.pieces[i].score = run, -1e9
    # Lengths that cannot be put together by doubling alone, and some that are not there.
    for i, piece in enumerate(model.pieces):
        if piece.piece in ("\u2581" * 7, "\u2581" * 11, "\u2581" * 15):
            piece.piece = f"<{i}>"
    return model.SerializeToString(deterministic=True)


def train_all(rng: random.Random) -> dict[str, bytes]:
    lines = sentences(rng, 3000)
    runs = ["".join(rng.choices(("ab", "a", "b", "  ", " "), k=40)) for _ in range(500)]
    indents = [" " * rng.randrange(1, 40) + rng.choice(WORDS) for _ in range(2000)]
    return {
        "llama": train(lines, vocab_size=560),
        "mistral": train(lines, vocab_size=570, control_symbols=MISTRAL_CONTROLS),
        "gemma": train(
            lines,
            vocab_size=600,
            add_dummy_prefix=False,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            eos_piece="<eos>",
            bos_piece="<bos>",
            control_symbols=["<unused0>", "<end_of_turn>"],
            user_defined_symbols=[
                *("<start_of_turn>", "<table>", "</table>", "</s>", "\n", "\n\n", "\n\n\n"),
                *("\u2581\u2581", "\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581"),
            ],
        ),
        # Almost every piece can be put together in several ways.
        "ties": train(runs, vocab_size=360, split_by_whitespace=False, split_digits=False),
        "indents": with_equal_runs(train(indents, vocab_size=420)),
        "no-bytes": train(lines, vocab_size=320, byte_fallback=False),
    }


def spm_goldens(proto: bytes, samples: list[str]) -> dict[str, object]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return {
        "proto": base64.b64encode(proto).decode(),
        "ids": [processor.encode(text) for text in samples],
    }


def token(text: str, **settings: bool) -> dict[str, object]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, "special": True} | plain | settings


def chats(protos: dict[str, bytes]) -> list[dict[str, object]]:
    """Texts with special tokens in them, as a template would write them."""
    size = len(sentencepiece.SentencePieceProcessor(model_proto=protos["llama"]))
    names = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    phi3 = {
        str(size + i): token(name, rstrip=name != "<|endoftext|>") for i, name in enumerate(names)
    }
    inst = {str(i): token(text) for i, text in ((3, "[INST]"), (4, "[/INST]"))}
    mistral = {"legacy": False, "additional_special_tokens": ["[INST]", "[/INST]"]}
    turns = {"5": token("<end_of_turn>"), "6": token("<start_of_turn>")}
    cases = [
        ("phi3", "llama", "LlamaTokenizer", {"legacy": True, "eos_token": "<|endoftext|>"}, phi3),
        ("llama2", "llama", "LlamaTokenizer", {}, {}),
        ("mistral", "mistral", "LlamaTokenizer", mistral, inst),
        ("gemma", "gemma", "GemmaTokenizer", {"bos_token": "<bos>", "eos_token": "<eos>"}, turns),
    ]
    samples = {
        "phi3": [
            "<|user|>\nhello world<|end|>\n<|assistant|>\n",
            "<|system|>\n\n  the word<|end|>\n<|user|>  \thello\n <|end|> <|assistant|>the",
            "<|endoftext|>hello<|endoftext|>\nhello",
        ],
        "llama2": ["[INST] hello world [/INST] the word </s><s>[INST] hello [/INST]", " hello"],
        "mistral": [
            "[INST] hello[/INST] the word</s>[INST]  hello\n[/INST]",
            "hello[INST] hello[/INST] hello",
        ],
        "gemma": [
            "<start_of_turn>user\nhello  world<end_of_turn>\n<start_of_turn>model\n",
            "<table>hello</table>\n\n\n\nthe   word<end_of_turn>",
        ],
    }
    goldens = []
    for name, model, kind, settings, listed in cases:
        settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"} | settings
        settings |= {"unk_token": "<unk>"}
        if listed:
            settings["added_tokens_decoder"] = listed
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "tokenizer.model").write_bytes(protos[model])
            Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
            tokenizer = getattr(transformers, kind).from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in samples[name]]
        goldens.append(
            {
                "name": name,
                "model": model,
                "settings": settings,
                "texts": samples[name],
                "ids": ids,
            }
        )
    return goldens


def mistral_chats(protos: dict[str, bytes]) -> dict[str, object]:
    """Conversations as Mistral's own library encodes them, by the version of their tokenizer."""
    conversations = [
        [("user", "hello world")],
        [("user", "  the x\n    is 1"), ("assistant", "hello, 2"), ("user", "where")],
        [("system", "the word"), ("user", "a"), ("assistant", "b"), ("user", "[INST]c</s>")],
    ]
    messages = [
        [{"role": role, "content": content} for role, content in turns] for turns in conversations
    ]
    ids = {}
    for version, model in (("v1", "llama"), ("v3", "mistral")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"tokenizer.model.{version}")
            path.write_bytes(protos[model])
            tokenizer = MistralTokenizer.from_file(str(path))
            ids[model] = [
                tokenizer.encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
                for chat in messages
            ]
    return {"messages": messages, "ids": ids}


def byte_level_goldens(rng: random.Random, samples: list[str]) -> dict[str, object]:
    """A vocabulary whose merges cross words, so that ids show where words were cut."""
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder.train_from_iterator([*samples * 3, *sentences(rng, 300)], trainer)
    state = json.loads(encoder.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in state["merges"]]
    byte_of = {char: byte for byte, char in tiktoken_chars().items()}
    ranks = {bytes(byte_of[char] for char in text): i for i, text in enumerate(vocab)}
    assert len(ranks) == len(vocab)
    ids = {}
    for name, expression in expressions().items():
        encoding = tiktoken.Encoding(
            name, pat_str=expression, mergeable_ranks=ranks, special_tokens={}
        )
        ids[name] = [encoding.encode_ordinary(text) for text in samples]
    return {"vocab": vocab, "merges": merges, "ids": ids}


def tiktoken_chars() -> dict[int, str]:
    """GPT-2's characters for bytes, read off the library that made the vocabulary."""
    chars = {}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in range(0x800):
        spelled = byte_level.pre_tokenize_str(chr(code))[0][0]
        chars |= dict(zip(chr(code).encode(), spelled, strict=True))
    for code in range(0x800, 0x110000, 0x40):
        if not 0xD800 <= code < 0xE000:
            spelled = byte_level.pre_tokenize_str(chr(code))[0][0]
            chars |= dict(zip(chr(code).encode(), spelled, strict=True))
    # Thirteen bytes are in no UTF-8; their characters are the alphabet's that are left.
    left = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(chars.values()))
    missing = [byte for byte in range(256) if byte not in chars]
    return chars | dict(zip(missing, left, strict=True))


def expressions() -> dict[str, str]:
    """What the families published."""
    with mock.patch.multiple(
        openai_public,
        load_tiktoken_bpe=lambda *_, **__: {},
        data_gym_to_mergeable_bpe_ranks=lambda **_: {},
    ):
        cl100k = openai_public.cl100k_base()["pat_str"]
        o200k = openai_public.o200k_base()["pat_str"]
        gpt2 = openai_public.gpt2()["pat_str"]
    data = Path(mistral_common.__file__).parent / "data"
    tekken = json.loads((data / "tekken_240911.json").read_text())["config"]["pattern"]
    return {
        "gpt2": gpt2,
        "cl100k": cl100k,
        "o200k": o200k,
        "tekken": tekken,
        "qwen2": tokenization_qwen2.PRETOKENIZE_REGEX,
    }


def main() -> None:
    rng = random.Random(20240229)
    samples = texts(rng)
    protos = train_all(rng)
    goldens = {
        "texts": samples,
        "sentencepiece": {name: spm_goldens(proto, samples) for name, proto in protos.items()},
        "chats": chats(protos),
        "mistral": mistral_chats(protos),
        "byte_level": byte_level_goldens(rng, samples),
    }
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(json.dumps(goldens, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(samples)} texts, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
