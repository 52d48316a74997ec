"""A request with its text, and what comes back for it: what every protocol builds and reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pallasite.engine.request import Finish, SamplingParams, Timing, TokenLogprobs, Usage


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is to be completed: exactly one of text, token_ids and messages is set.

    Attributes:
        text: a text.
        token_ids: token ids, taken as they are.
        messages: a chat, each message with "role" and "content", for the model's template.
        adds_special_tokens: whether the tokenizer adds its special tokens to `text`.
        adds_generation_prompt: whether the template adds the beginning of the answer.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    adds_special_tokens: bool = True
    adds_generation_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A prompt to be completed `params.n` times, as every protocol states it.

    Attributes:
        prompt: what is to be completed.
        params: the parameters that the engine takes; `bad_words` adds to params.bad_words.
        stop: texts that end a completion.
        bad_words: words that may not be completed.
        skips_special: whether special tokens are left out of the text.
        model: the model's name; empty takes the served one.
        request_id, priority, timeout_s, tenant, adapter: as in the engine's Request.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    skips_special: bool = True
    model: str = ""
    request_id: str = ""
    priority: int = 0
    timeout_s: float | None = None
    tenant: str = ""
    adapter: str = ""


@dataclass(slots=True, kw_only=True)
class TextEvent:
    """What was added to one completion; as the engine's TokenEvent, with the text."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How likely a prompt's tokens are.

    Attributes:
        token_ids: the prompt.
        logprobs: one a token given those before it; None for the first.
        top: one a token: the likeliest tokens to follow it, best first, with log-probabilities.
        usage, timing: what it cost.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    usage: Usage
    timing: Timing
