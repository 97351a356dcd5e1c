"""``vase-vllm inspect``: which positions each KV head holds over time."""
