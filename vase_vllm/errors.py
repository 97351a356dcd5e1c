"""The one exception that this package raises for what a user can mend."""


class EvictionError(ValueError):
    """Eviction cannot be served as it was asked for.

    The message is one line that names the setting and the remedy. At a shell it is all that is
    printed; a program gets the exception. Settings may come from anywhere: what is not printable
    in them, a line's end for instance, is shown escaped.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(shown))
