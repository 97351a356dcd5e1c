"""KV-cache eviction for an unmodified vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vase-vllm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
