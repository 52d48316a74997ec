"""SentencePiece's BPE against its own algorithm; characters that no piece spells.

The algorithm is that of bpe_model.cc in github.com/google/sentencepiece, with its agenda of pairs.
"""

import heapq
import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from pallasite.engine.errors import RequestError
from pallasite.server.sentencepiece import Pieces, build_encoder, splits_of_unused
from pallasite.server.sentencepiece_file import _model_proto
from pallasite.server.tokenizer import Tokenizer, load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.tiny_tokenizers import BYTE, NORMAL, UNKNOWN, UNUSED, sentencepiece_metadata

LETTERS = "abc"


def _bpe_model(text: str, kinds: dict[str, int], scores: dict[str, float]) -> list[str]:
    """`Model::Encode`: pairs are kept by score, then place; an unused piece is cut at the end."""
    pieces: list[str | None] = list(text)
    rest = {i: i + 1 for i in range(len(pieces))}
    before = {i + 1: i for i in range(len(pieces))}
    agenda: list[tuple[float, int, int, str]] = []
    cuts: dict[str, tuple[str, str]] = {}

    def add(left: int, right: int) -> None:
        if left < 0 or right >= len(pieces):
            return
        whole = pieces[left] + pieces[right]
        if whole in scores:
            heapq.heappush(agenda, (-scores[whole], left, right, whole))
            if kinds[whole] == UNUSED:
                cuts[whole] = (pieces[left], pieces[right])

    for i in range(len(pieces) - 1):
        add(i, i + 1)
    while agenda:
        _, left, right, whole = heapq.heappop(agenda)
        if pieces[left] is None or pieces[right] is None or pieces[left] + pieces[right] != whole:
            continue
        pieces[left], pieces[right] = whole, None
        rest[left] = rest[right]
        before[rest[left]] = left
        add(before.get(left, -1), left)
        add(left, rest[left])

    def cut(piece: str) -> list[str]:
        if kinds.get(piece) != UNUSED or piece not in cuts:
            return [piece]
        return [part for half in cuts[piece] for part in cut(half)]

    return [part for piece in pieces if piece is not None for part in cut(piece)]


WORDS = ["".join(w) for n in range(2, 5) for w in itertools.product(LETTERS, repeat=n)]


@given(data=st.data(), text=st.text(alphabet=LETTERS, min_size=1, max_size=24))
def test_unused_pieces_are_joined_through_and_cut_again(data, text):
    words = data.draw(st.lists(st.sampled_from(WORDS), unique=True, min_size=3, max_size=20))
    texts = [*LETTERS, *words]
    is_unused = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    types = [UNUSED if unused else NORMAL for unused in is_unused]
    scores = [float(x) for x in data.draw(st.permutations(range(len(texts))))]
    pieces = Pieces(texts=texts, types=types, scores=scores, unknown_id=None)
    encoder, splits = build_encoder(pieces, puts_space_in_front=False), splits_of_unused(pieces)
    ids = encoder.encode(text, add_special_tokens=False).ids
    got = [texts[part] for token_id in ids for part in splits.get(token_id, (token_id,))]
    kinds = dict(zip(texts, types, strict=True))
    assert got == _bpe_model(text, kinds, dict(zip(texts, scores, strict=True)))


def unused_metadata() -> dict[str, object]:
    """A vocabulary where "hello" is joined of "hell" and "o", and "hell" is not used."""
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.token_type"][tokens.index("hell")] = UNUSED
    metadata["tokenizer.ggml.scores"][tokens.index("lo")] = -1.0
    return metadata


def from_gguf(folder):
    return Tokenizer(build_from_gguf(unused_metadata()))


def from_model(folder):
    metadata = unused_metadata()
    message = _model_proto()()
    names = ("tokens", "scores", "token_type")
    for text, score, kind in zip(*(metadata[f"tokenizer.ggml.{n}"] for n in names), strict=True):
        message.pieces.add(piece=text.encode(), score=score, type=kind)
    message.trainer_spec.model_type = 2
    message.trainer_spec.bos_id = metadata["tokenizer.ggml.bos_token_id"]
    message.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(message.SerializeToString())
    return load_tokenizer(folder)


@pytest.mark.parametrize("make", [from_gguf, from_model])
def test_a_tokenizer_joins_through_a_piece_that_is_unused(make, tmp_path):
    tokenizer = make(tmp_path)

    def pieces(text: str) -> list[str]:
        ids = tokenizer.encode(text, adds_special_tokens=False)
        return [tokenizer.token_text(i) for i in ids]

    assert pieces("hello") == ["\u2581hello"]
    assert pieces("hell") == ["\u2581", "he", "ll"]
    assert pieces("hells hello") == ["\u2581", "he", "ll", "s", "\u2581hello"]
    ids = tokenizer.encode("hell", adds_special_tokens=False)
    assert tokenizer.decode(ids, skips_special=True) == "hell"
    chat = tokenizer.encode_pieces(tokenizer.split_special("<s>hell"))
    assert [tokenizer.token_text(i) for i in chat] == ["<s>", "\u2581", "he", "ll"]


def bare_metadata() -> dict[str, object]:
    """SentencePiece without byte pieces, and without an unknown one."""
    metadata = sentencepiece_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    for i, kind in enumerate(types):
        types[i] = UNUSED if kind in (UNKNOWN, BYTE) else kind
    del metadata["tokenizer.ggml.unknown_token_id"]
    return metadata


def hf_folder(folder, model, normalizer=None):
    """A tokenizer.json of SentencePiece's kind."""
    encoder = tokenizers.Tokenizer(model)
    encoder.normalizer = normalizer or normalizers.Replace(" ", "\u2581")
    encoder.decoder = decoders.Replace("\u2581", " ")
    encoder.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


VOCAB = {"a": 0, "b": 1, "ab": 2, "\u2581": 3, "<unknown>": 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: Tokenizer(build_from_gguf(bare_metadata())),
        lambda folder: hf_folder(folder, models.BPE(vocab=VOCAB, merges=[("a", "b")])),
        lambda folder: hf_folder(
            folder, models.BPE(vocab=VOCAB, merges=[("a", "b")], byte_fallback=True)
        ),
        lambda folder: hf_folder(folder, models.Unigram([(text, -1.0) for text in VOCAB], None)),
    ],
    ids=["gguf", "bpe", "bytes", "unigram"],
)
def test_a_character_that_no_piece_spells_is_refused_and_not_dropped(make, tmp_path):
    tokenizer = make(tmp_path)
    for text in ("ab a", "ab"):
        ids = tokenizer.encode(text, adds_special_tokens=False)
        assert tokenizer.decode(ids, skips_special=False) == text
    for text, char in (
        ("ab\u6570a", "6570"),
        ("\U0001f642", "1F642"),
        ("a" * 5000 + "\xdf", "00DF"),
    ):
        with pytest.raises(
            RequestError, match=rf"got U\+{char} in text; .* has no text token"
        ) as no:
            tokenizer.encode(text, adds_special_tokens=False, field="text")
        assert no.value.field == "text"
        with pytest.raises(RequestError, match=rf"got U\+{char} in stop"):
            tokenizer.encode_inside(text, field="stop")
        with pytest.raises(RequestError, match=rf"got U\+{char} in messages"):
            tokenizer.encode_pieces(["a", text])


def test_a_character_that_normalizing_makes_is_refused_too(tmp_path):
    model = models.BPE(vocab={"e": 0, "\u0301": 1, "\u2581": 2}, merges=[])
    tokenizer = hf_folder(tmp_path, model, normalizers.NFC())
    assert tokenizer.encode("e", adds_special_tokens=False) == [0]
    with pytest.raises(RequestError, match=r"got U\+0301 in prompt; this model's vocabulary"):
        tokenizer.encode("e\u0301", adds_special_tokens=False)


def test_a_gguf_that_names_no_unknown_piece_has_the_one_of_that_type():
    metadata = sentencepiece_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    for i, kind in enumerate(types):
        types[i] = UNUSED if kind == BYTE else kind
    del metadata["tokenizer.ggml.unknown_token_id"]
    tokenizer = Tokenizer(build_from_gguf(metadata))
    ids = tokenizer.encode("a\u6570b", adds_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == ["\u2581a", "<unk>", "b"]
