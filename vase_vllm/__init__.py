"""KV-cache eviction for an unmodified vLLM."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vase_vllm.integration.llm import LLM

try:
    __version__ = version("vase-vllm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

ADDITIONAL_CONFIG_KEY = "kv_eviction"
"""Where the settings travel in vLLM's ``additional_config``."""

__all__ = ["ADDITIONAL_CONFIG_KEY", "LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """``LLM`` brings vLLM along, which whoever reads the version need not have."""
    if name == "LLM":
        from vase_vllm.integration.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
