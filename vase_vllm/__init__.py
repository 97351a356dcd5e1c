"""KV-cache eviction for an unmodified vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vase-vllm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

ADDITIONAL_CONFIG_KEY = "kv_eviction"
"""Where the settings travel in vLLM's ``additional_config``."""

__all__ = ["ADDITIONAL_CONFIG_KEY", "__version__"]
