"""The status page: routes that vLLM's API server has if ``VLLM_PLUGINS`` names ``vase-status``."""
