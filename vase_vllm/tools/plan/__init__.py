"""``vase-vllm plan``: what fits into a GPU and how fast it decodes, before it is bought."""
