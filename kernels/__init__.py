"""Eviction kernels: the plain-torch implementation and the Triton launches.

Nothing in this package imports vLLM or pydantic, so that the kernels can be tested and timed on
a machine that has torch and Triton alone.
"""
