"""Where tokens, queries and numbers lie, and when a sequence evicts: pure arithmetic.

Nothing here imports torch or vLLM, so that the scheduler, the workers, the kernels and the planner
all compute it in one place, on machines that have neither.
"""
