"""The operator's errors, raised while a model is read, planned or loaded; never while it serves."""


class ConfigError(Exception):
    """Something that the operator chose cannot work: a flag, a checkpoint, a memory limit.

    The message has three parts: what we got, what is allowed, what to change. It carries no path
    and no address. The command line prints it and exits with status 2.
    """


class CheckpointError(ConfigError):
    """A checkpoint is damaged, incomplete or contradicts itself. The message names the tensor."""
