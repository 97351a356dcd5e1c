"""Shared fixtures: models on disk, and vLLM in this process."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.demo_model import shared_demo_model

# Engines run in the test's own process, where their scheduler and block pool can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two processes that bind the same cores stall each other a hundredfold.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test depends on how fast the machine is.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> "ModelZoo":
    return ModelZoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """A directory with SmolLM2-135M-Instruct, a real model."""
    return shared_demo_model()


class ModelZoo:
    """Random models, made on first use. Large weights make their attention peaked and varied."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def qwen3(self, **changes: object) -> Path:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return self._make(Qwen3Config, Qwen3ForCausalLM, changes)

    def llama(self, **changes: object) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        return self._make(LlamaConfig, LlamaForCausalLM, changes)

    def mistral(self) -> Path:
        from transformers import MistralConfig, MistralForCausalLM

        return self._make(MistralConfig, MistralForCausalLM, {"sliding_window": None})

    def qwen3_moe(self) -> Path:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return self._make(Qwen3MoeConfig, Qwen3MoeForCausalLM, experts)

    def gpt_oss(self) -> Path:
        """Attention sinks, and a sliding window in every second layer."""
        from transformers import GptOssConfig, GptOssForCausalLM

        changes = {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        return self._make(GptOssConfig, GptOssForCausalLM, changes)

    def gemma2(self) -> Path:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        return self._make(Gemma2Config, Gemma2ForCausalLM, {"tie_word_embeddings": True})

    def gemma3(self) -> Path:
        """Two layers with a sliding window of 64, then one of full attention."""
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
        changes = {
            "num_hidden_layers": 3,
            "sliding_window": 64,
            "layer_types": layer_types,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
        }
        return self._make(Gemma3TextConfig, Gemma3ForCausalLM, changes)

    def llama4(self) -> Path:
        """Chunked local attention in three of four layers."""
        from transformers import Llama4ForCausalLM, Llama4TextConfig

        changes = {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 256,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
            "pad_token_id": 0,
        }
        return self._make(Llama4TextConfig, Llama4ForCausalLM, changes)

    def bloom(self) -> Path:
        from transformers import BloomConfig, BloomForCausalLM

        changes = {"n_head": 4, "n_layer": 2, "tie_word_embeddings": True}
        return self._make(BloomConfig, BloomForCausalLM, changes)

    def _make(self, config_class, model_class, changes: dict[str, object]) -> Path:
        import torch

        name = "-".join([model_class.__name__, *(f"{k}={v}" for k, v in sorted(changes.items()))])
        name = "".join(c if c.isalnum() or c in "-=" else "_" for c in name)
        directory = self.root / name
        if not directory.exists():
            torch.manual_seed(0)
            settings = {
                "vocab_size": 32768,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": False,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "initializer_range": 0.3,
            }
            model_class(config_class(**(settings | changes))).save_pretrained(directory)
        return directory
