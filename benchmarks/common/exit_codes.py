"""Exit codes of commands that have more to say than whether they failed."""

import os

OUT_OF_TIME = os.EX_TEMPFAIL
"""The time was over; the same command goes on."""
SKIPPED = 77
"""What was asked for cannot be done here, and the last line says why; Automake and Meson use it."""
