"""The error that this package raises for data problems that the user can fix."""


class DataError(ValueError):
    """A source, shard or setting cannot be used; the message names it and the remedy."""
