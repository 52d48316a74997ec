"""Why a case cannot be compiled."""


class CompileError(Exception):
    """The case cannot be made or compiled; the text is the compiler's, shortened."""


class MissingCompilerError(CompileError):
    """The compiler for the target is not installed; the text says how to install it."""
