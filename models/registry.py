"""The families that can be served. A new one is its file and its line here."""

from collections.abc import Callable

from pallasite.models.config import ModelConfig
from pallasite.models.decoder import Decoder
from pallasite.models.errors import ConfigError
from pallasite.models.forms import BaseForm
from pallasite.models.llama import Llama
from pallasite.models.weights import Declare
from pallasite.pallas_kernels.target import Target

FAMILIES: dict[str, Callable[[ModelConfig, Declare], Decoder]] = {
    "llama": Llama,
}


def make_model(config: ModelConfig, form: BaseForm, target: Target) -> Decoder:
    """Returns the abstract model of a config: shapes, dtypes, axes and no memory."""
    if config.family not in FAMILIES:
        raise ConfigError(
            f"got a model of the family {config.family!r}; served are {', '.join(FAMILIES)};"
            " choose a model of one of them"
        )
    return FAMILIES[config.family](config, Declare(form, target))
