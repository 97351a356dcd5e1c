"""lm-evaluation-harness without its own 14,000 task files, which take most of a short run to read.

On PYTHONPATH this reaches every process, and does nothing in others than the harness.
"""

import functools
import sys

if "lm_eval" in sys.orig_argv:
    from lm_eval.tasks import TaskManager

    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
