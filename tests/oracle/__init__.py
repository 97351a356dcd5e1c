"""An oracle of the eviction, written from the description of the algorithm alone.

Nothing here imports vase_vllm: the oracle must not share the mistakes of what it judges.

- `selection`: which tokens one eviction of one KV head keeps.
- `policies`: the same for every other policy, and for VaSE's ablations.
- `cache`: the contiguous cache of one layer.
- `hf_eviction`: greedy decoding of a Hugging Face model with eviction over a contiguous cache.
- `law`: the exact law of sequential draws without replacement, and a test against counts.
"""
