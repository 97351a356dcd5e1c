"""Eviction kernels: the implementation in plain torch and the one in Triton.

Nothing in this package imports vLLM or pydantic, so that the kernels can be tested and timed on
a machine that has torch and Triton alone.
"""
