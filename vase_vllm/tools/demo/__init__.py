"""``make demo``: the same requests to two servers, with the full cache and under eviction."""
