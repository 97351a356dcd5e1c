"""The places where a worker changes objects that vLLM has made. There is no other.

================================ ================================ ==================================
changed                          why                              can go when vLLM has
================================ ================================ ==================================
the class of a layer's attention the model is loaded before       a hook between choosing a layer's
implementation                   anybody knows its backends, and  backend and building its
                                 builders check the class, so     implementation
                                 that it cannot be wrapped
an attribute of the step's       a layer's forward gets nothing   room for a plugin's own entries in
attention metadata               else that belongs to one step    the attention metadata
================================ ================================ ==================================
"""

from typing import Any

from vase_vllm.worker.step import RingWrite

_RING_WRITE = "eviction_ring_write"


def mix_into(instance: object, mixin: type) -> None:
    """Make an object one of a subclass of its class that has ``mixin`` in front of it."""
    original = type(instance)
    instance.__class__ = type(f"Eviction{original.__name__}", (mixin, original), {})


def attach_ring_write(metadata: Any, ring_write: RingWrite | None) -> None:
    """Let a step's attention metadata carry where the step's queries go."""
    setattr(metadata, _RING_WRITE, ring_write)


def ring_write_of(metadata: Any) -> RingWrite | None:
    """What :func:`attach_ring_write` has attached."""
    ring_write: RingWrite | None = getattr(metadata, _RING_WRITE)
    return ring_write
