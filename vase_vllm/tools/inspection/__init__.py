"""``vase-vllm inspect``: shows which positions each KV head holds over time."""
