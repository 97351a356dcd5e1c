"""Eviction policies: one small file each, found by name through the entry points of a package.

A policy ranks the tokens that may be evicted. All policies share the rest: when a sequence evicts,
where its tokens lie, how the ranking becomes a set of survivors and how these move.
docs/policies.md says how to write another policy.
"""

from vase_vllm.policies.base import AttentionPolicy, Policy
from vase_vllm.policies.candidates import Candidates

__all__ = ["AttentionPolicy", "Candidates", "Policy"]
