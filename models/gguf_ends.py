"""Which tokens end an answer though a GGUF file does not say so: for engine and tokenizer alike."""

from collections.abc import Sequence

# The ends of a turn, a message and a text in the chat formats that GGUF files are made for. Older
# converters wrote `eos_token_id` alone, which is often the end of a text and not that of a turn.
# "</s>" is none of them: where it ends a text it is EOS, and in Gemma it is a tag of HTML.
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_turn>",
    }
)


def ends_by_text(tokens: Sequence[str]) -> list[int]:
    """Returns the ids of a vocabulary's tokens that end an answer by their text."""
    return [token_id for token_id, text in enumerate(tokens) if text in END_TEXTS]
