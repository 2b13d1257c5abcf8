"""The one exception of our own."""


class CompileError(RuntimeError):
    """A CUDA variant did not compile, or the compiler or architecture for it is missing."""
