"""Entry point of the plugin (group ``vllm.general_plugins``).

vLLM calls :func:`register` in every process: the API server, the engine core and each worker.
"""

from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def register() -> None:
    """Add ``--kv-eviction`` to vLLM. Idempotent; without that flag nothing in vLLM changes.

    Beside a vLLM of another version nothing is touched: a warning says so, and the flag, if it is
    given, is refused as unknown.
    """
    import vllm
    from vllm.logger import init_logger

    supported = supported_vllm()
    if not supported.contains(vllm.__version__, prereleases=True):
        init_logger("vllm.vase_vllm").warning(
            "vase-vllm %s supports vllm%s and found %s: --kv-eviction is not available; install "
            "a supported vLLM or another vase-vllm",
            version("vase-vllm"),
            supported,
            vllm.__version__,
        )
        return
    from vase_vllm.integration import patches

    patches.apply()


def supported_vllm() -> SpecifierSet:
    """The vLLM versions that work, as this package's own metadata states them."""
    requirements = map(Requirement, requires("vase-vllm") or ())
    return next(r.specifier for r in requirements if r.name == "vllm")
