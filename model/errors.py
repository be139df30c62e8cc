"""The error of this package.

ModelError (ValueError)     a model that cannot be built as it was described
"""


class ModelError(ValueError):
    """A model description breaks a rule; the message names the field, its value and the rule."""
