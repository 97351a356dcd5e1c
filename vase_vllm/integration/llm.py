"""vLLM's ``LLM`` for programs, with the flags of ``vllm serve`` as arguments."""

from collections.abc import Mapping
from typing import Any

import vllm

from vase_vllm import ADDITIONAL_CONFIG_KEY
from vase_vllm.integration.flags import settings_of


class LLM(vllm.LLM):
    """``vllm.LLM`` with two more arguments.

    vLLM loads plugins after it has looked at the arguments: its own class cannot take them::

        from vase_vllm import LLM

        llm = LLM("Qwen/Qwen3-8B", kv_eviction="vase", kv_eviction_config={"budget": 4096})
    """

    def __init__(
        self,
        *args: Any,
        kv_eviction: str = "none",
        kv_eviction_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make an engine.

        Args:
            args, kwargs: of ``vllm.LLM``.
            kv_eviction: as ``--kv-eviction``.
            kv_eviction_config: as ``--kv-eviction-config``.

        Raises:
            EvictionError: one line that names the setting and the remedy.
        """
        if kv_eviction != "none" or kv_eviction_config is not None:
            settings = settings_of(kv_eviction, kv_eviction_config)
            additional = kwargs.get("additional_config") or {}
            kwargs["additional_config"] = {**additional, ADDITIONAL_CONFIG_KEY: settings}
        super().__init__(*args, **kwargs)
