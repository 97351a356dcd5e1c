"""The one exception that this package raises for what a user can mend."""


class EvictionError(ValueError):
    """Eviction cannot be served as it was asked for.

    The message is one line that names the setting and the remedy. At a shell it is all that is
    printed; a program gets the exception.
    """
