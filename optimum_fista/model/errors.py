"""The error for models that can't be pruned."""


class UnsupportedArchitectureError(ValueError):
    """The model has a structure that can't be pruned; the message says what was looked for and found."""
