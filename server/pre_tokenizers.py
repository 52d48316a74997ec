"""Where byte-level BPE cuts text into words: a GGUF file has a name, the expressions stand here.

Each is what the model's own tokenizer cuts with, named in `tokenizer.ggml.pre` as llama.cpp's
converters name it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class WordRules:
    """How one family's byte-level BPE treats text.

    Attributes:
        expressions: each cuts what those before it left.
        takes_whole_words: whether a word that is a token is that token, whatever the merges say.
        adds_bos: whether a prompt begins with BOS unless the file says otherwise.
        composes: whether text is first brought to Unicode's composed form (NFC).
    """

    expressions: tuple[str, ...]
    takes_whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Returns what cuts at each expression in turn, then maps bytes to characters."""
        splits = (pre_tokenizers.Split(Regex(x), "isolated") for x in self.expressions)
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def normalizer(self) -> normalizers.Normalizer | None:
        """Returns what brings text to the form that the expressions see, if anything."""
        return normalizers.NFC() if self.composes else None


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _by_case(digits: str, ending: str) -> str:
    """Words of capitals and then small letters; a letter without a case is both."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_THREE_DIGITS, _ONE_DIGIT = r"\p{N}{1,3}", r"\p{N}"
_LLAMA3 = WordRules(expressions=(_cl100k(_THREE_DIGITS),), takes_whole_words=True, adds_bos=True)
_QWEN2 = WordRules(expressions=(_cl100k(_ONE_DIGIT),), composes=True)
WORD_RULES: Mapping[str, WordRules] = {
    "default": WordRules(
        expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "gpt-2": WordRules(expressions=(_GPT2,)),
    "smollm": WordRules(expressions=(_ONE_DIGIT, _GPT2)),
    "olmo": WordRules(expressions=(_GPT2,), composes=True),
    # OLMo 2 has DBRX's words, and so has Phi 4.
    "dbrx": WordRules(expressions=(_cl100k(_THREE_DIGITS),)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": WordRules(
        expressions=(_by_case(_ONE_DIGIT, ""),), takes_whole_words=True, adds_bos=True
    ),
    "gpt-4o": WordRules(expressions=(_by_case(_THREE_DIGITS, f"{_CONTRACTION}?"),)),
}
