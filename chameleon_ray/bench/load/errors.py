"""The load generator's one exception."""


class LoadError(RuntimeError):
    """The benchmark cannot be run or goes on as asked; the message says what to do."""
