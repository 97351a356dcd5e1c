"""What runs in vLLM's workers: the wrapper around attention, evictions, pages, the query ring."""
