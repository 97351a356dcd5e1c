"""``vase-vllm plan``: predicts what fits into a GPU and how fast it decodes."""
