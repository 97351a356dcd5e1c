"""The time that a call has, for commands on a machine that is lent for minutes."""

import time


class OutOfTimeError(Exception):
    """The call's time is over; the same command goes on where it stopped."""


class Clock:
    """The time that a call has.

    Args:
        minutes: of the whole call; None is no limit.
        start: ``time.monotonic()`` when the call began.
    """

    def __init__(self, minutes: float | None, start: float) -> None:
        self.minutes = minutes
        self._end = None if minutes is None else start + 60 * minutes

    def left(self, at_least: float = 0.0) -> float | None:
        """Seconds that are left; None is no limit.

        Raises:
            OutOfTimeError: fewer than ``at_least`` are.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= at_least:
            needed = f", {at_least:.0f} s are needed" if at_least else ""
            raise OutOfTimeError(f"{max(left, 0):.0f} s are left{needed}")
        return left
