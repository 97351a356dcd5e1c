"""Whole-number arithmetic that the standard library lacks."""


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up.

    >>> cdiv(65, 32)
    3
    """
    return -(-dividend // divisor)
