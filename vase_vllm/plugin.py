"""Entry point of the plugin (group ``vllm.general_plugins``).

vLLM calls :func:`register` in every process: the API server, the engine core and each worker.
"""


def register() -> None:
    """Add ``--kv-eviction`` to vLLM. Idempotent; without that flag nothing in vLLM changes."""
    from vase_vllm import vllm_patches

    vllm_patches.apply()
