"""Only the list of packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["vase_vllm", "vase_vllm.*"]), "vase_vllm.kernels"])
