"""The error that every module of this package raises for data the user can mend."""


class DataError(ValueError):
    """A source, shard or setting that cannot be used; the message names it and what to do about it."""
