"""The families' chat formats, each with a template of our own in templates/.

A format is what a model was trained on: its markers and where they stand. The templates use what
those of checkpoints are written with, and each comes with `CHAT` as the format has it.
"""

from dataclasses import dataclass, field
from pathlib import Path

TEMPLATE_FILES = Path(__file__).parent / "templates"
SYSTEM, FIRST, ANSWER, SECOND = (
    "Be brief.",
    "Hello there",
    "<think>\nhm\n</think>\n\nHi!",
    "And you?",
)
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A chat format.

    Attributes:
        template: the name of a file in templates/.
        expected: CHAT with the beginning of an answer.
        bos, eos: the texts of `bos_token` and `eos_token`; no BOS where it is None.
        end: the text that ends a turn.
        specials: the format's other special tokens.
        variables: what the template reads besides the conversation, with values to try.
    """

    template: str
    expected: str
    bos: str | None
    eos: str
    end: str
    specials: tuple[str, ...] = ()
    variables: dict[str, list[object]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return (TEMPLATE_FILES / f"{self.template}.jinja").read_text(encoding="utf-8")


TURN = "<|im_start|>{}\n{}<|im_end|>\n".format
_CHATML = TURN("system", SYSTEM) + TURN("user", FIRST)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
FAMILIES = {
    "mistral-v1": Family(
        template="mistral_v1",
        expected=f"<s> [INST] {SYSTEM}\n\n{FIRST} [/INST] {ANSWER}</s> [INST] {SECOND} [/INST]",
        bos="<s>",
        eos="</s>",
        end="</s>",
    ),
    "mistral-v3": Family(
        template="mistral_v3",
        expected=f"<s>[INST] {FIRST}[/INST] {ANSWER}</s>[INST] {SYSTEM}\n\n{SECOND}[/INST]",
        bos="<s>",
        eos="</s>",
        end="</s>",
        specials=(
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "qwen2": Family(
        template="qwen2",
        expected=_CHATML
        + TURN("assistant", ANSWER)
        + TURN("user", SECOND)
        + "<|im_start|>assistant\n",
        bos=None,
        eos="<|im_end|>",
        end="<|im_end|>",
        specials=("<|endoftext|>", "<|im_start|>"),
    ),
    "qwen3": Family(
        template="qwen3",
        expected=_CHATML
        + TURN("assistant", "Hi!")
        + TURN("user", SECOND)
        + "<|im_start|>assistant\n",
        bos=None,
        eos="<|im_end|>",
        end="<|im_end|>",
        specials=("<|endoftext|>", "<|im_start|>"),
        variables={"enable_thinking": [True, False]},
    ),
    "gemma": Family(
        template="gemma",
        expected=(
            f"<bos><start_of_turn>user\n{SYSTEM}\n\n{FIRST}<end_of_turn>\n"
            f"<start_of_turn>model\n{ANSWER}<end_of_turn>\n"
            f"<start_of_turn>user\n{SECOND}<end_of_turn>\n<start_of_turn>model\n"
        ),
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        specials=("<start_of_turn>", "<start_of_image>"),
    ),
    "phi3": Family(
        template="phi3",
        expected=(
            f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{FIRST}<|end|>\n"
            f"<|assistant|>\n{ANSWER}<|end|>\n<|user|>\n{SECOND}<|end|>\n<|assistant|>\n"
        ),
        bos="<s>",
        eos="<|endoftext|>",
        end="<|end|>",
        specials=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "olmo2": Family(
        template="olmo2",
        expected=(
            f"<|endoftext|><|system|>\n{SYSTEM}\n<|user|>\n{FIRST}\n"
            f"<|assistant|>\n{ANSWER}<|endoftext|>\n<|user|>\n{SECOND}\n<|assistant|>\n"
        ),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        end="<|endoftext|>",
    ),
    "llama3": Family(
        template="llama3",
        expected=(
            f"<|begin_of_text|>{_HEADER('system')}Century: 20\n\n{SYSTEM}<|eot_id|>"
            f"{_HEADER('user')}{FIRST}<|eot_id|>{_HEADER('assistant')}{ANSWER}<|eot_id|>"
            f"{_HEADER('user')}{SECOND}<|eot_id|>{_HEADER('assistant')}"
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        end="<|eot_id|>",
        specials=("<|start_header_id|>", "<|end_header_id|>"),
        variables={"date_string": ["1999"]},
    ),
    "modes": Family(
        template="modes",
        expected=(
            TURN("system", f"mode: ON\n{SYSTEM}")
            + TURN("user", FIRST)
            + TURN("assistant", ANSWER)
            + TURN("user", SECOND)
            + "<|im_start|>assistant\n"
        ),
        bos=None,
        eos="<|im_end|>",
        end="<|im_end|>",
        specials=("<|endoftext|>", "<|im_start|>"),
        variables={"reasoning": ["off", "", "on"]},
    ),
}
