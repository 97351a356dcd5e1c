"""How eviction gets into an unmodified vLLM: its flags, its configuration, its metrics."""
