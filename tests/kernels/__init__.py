INTERPRETED = (
    *("test_conformance.py", "test_decode_attention.py"),
    *("test_evict.py", "test_evict_distinctness.py"),
    *("test_evict_edges.py", "test_evict_remembering.py", "test_evict_scoring.py"),
    "test_evict_strata.py",
    *("test_examples.py", "test_remap.py", "test_ring.py", "test_selection.py", "test_traps.py"),
)
"""The files of this directory that run kernels, which on a CPU takes Triton's interpreter."""
INTERPRETED_VLLM = ("test_metadata_builders.py",)
"""Likewise, with vLLM's own modules imported under the interpreter: in a process of their own."""
