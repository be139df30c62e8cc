"""The errors of this package.

StrategyError (ValueError)      a strategy, or a strategy with a model or a batch, that cannot run or would be wrong
DataError (ValueError)          a text that cannot feed the training asked for
RoutingError (ValueError)       a routing of tokens that is none, or not that of this model
"""


class StrategyError(ValueError):
    """A parallel strategy breaks a rule; the message says what, why, and the nearest valid choice."""


class DataError(ValueError):
    """A text or token file is missing, too short or not what it is said to be; the message says which and where."""


class RoutingError(ValueError):
    """A routing of tokens to experts cannot be read, or is not that of what runs; the message says what to give."""
