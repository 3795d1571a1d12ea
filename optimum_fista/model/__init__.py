"""A model of Transformers as a sequence of decoder layers with linear operators in them, and what they see of data."""


class UnsupportedArchitectureError(ValueError):
    """The model has a structure that can't be pruned; the message says what was looked for and found."""
