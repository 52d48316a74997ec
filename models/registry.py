"""The families that can be served. A new one is its file and its line here."""

import re
from collections.abc import Callable

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.errors import ConfigError
from pallasite.models.forms import BaseForm, Rule, check_rules, form_of
from pallasite.models.gemma3 import Gemma3
from pallasite.models.llama import Llama
from pallasite.models.mistral import Mistral
from pallasite.models.olmo2 import Olmo2
from pallasite.models.partition import Partition, group_unit
from pallasite.models.phi3 import Phi3
from pallasite.models.qwen2 import Qwen2
from pallasite.models.qwen3 import Qwen3
from pallasite.models.weights import Declare, Matrix, declared_weights
from pallasite.pallas_kernels.target import Target

FAMILIES: dict[str, Callable[[ModelConfig, Declare], Decoder]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma3": Gemma3,
    "phi3": Phi3,
    "olmo2": Olmo2,
}


def make_model(
    config: ModelConfig,
    base: BaseForm,
    target: Target,
    num_parts: int = 1,
    rules: tuple[Rule, ...] = (),
) -> Decoder:
    """Returns the abstract model of a config: shapes, dtypes, axes and no memory.

    Args:
        base: the form of weights that neither a rule nor the checkpoint gives one.
        num_parts: devices that share the weights.
        rules: the operator's, before those of `config.stored_forms`.

    Raises ConfigError for an unknown family, a rule that no weight's name matches and groups that
    do not fit.
    """
    if config.family not in FAMILIES:
        raise ConfigError(
            f"got a model of the family {config.family!r}; served are {', '.join(FAMILIES)};"
            " choose a model of one of them"
        )
    all_rules = (*rules, *config.stored_forms)
    check_rules(all_rules)
    family = FAMILIES[config.family]
    # Once without forms, to learn which matrices take what the feed-forward's channels hold.
    plain = family(config, Declare(base, target, Partition(config=config), ()))
    unit = group_unit(_channel_groups(plain, all_rules), config.ffn_width, num_parts)
    declare = Declare(
        base, target, Partition(config=config, num_parts=num_parts, unit=unit), all_rules
    )
    model = family(config, declare)
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in declare.names):
            raise ConfigError(
                f"got the weight pattern {pattern!r}, which matches none of this model's weights;"
                f" they are: {', '.join(declare.names)}; mend it or leave it out"
            )
    return model


def matrix_forms(model: Decoder) -> dict[str, str]:
    """Returns the form that each matrix is held in, by the name that rules are matched against."""
    return {
        weight.source.pattern_name: str(weight.form)
        for _, weight in declared_weights(model)
        if isinstance(weight, Matrix)
    }


def _channel_groups(model: Decoder, rules: tuple[Rule, ...]) -> list[int | None]:
    """Returns the groups in which the feed-forward's channels are multiplied, a matrix each."""
    forms = [
        form_of(matrix.source.pattern_name, rules)
        for _, matrix in declared_weights(model)
        if isinstance(matrix, Matrix) and matrix.axes[-1] == "ffn"
    ]
    return [form.group for form in forms if form is not None]
