"""The Mistral family (Jiang et al. 2023): Llama's blocks, whose queries may see a window alone."""

from pallasite.models.llama import Llama


class Mistral(Llama):
    """A Mistral model's weights. The windows are the config's."""
