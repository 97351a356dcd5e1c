"""Finds policies by name: those of this package, and entry points of other packages."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from vase_vllm.errors import EvictionError
from vase_vllm.policies.base import Policy

GROUP = "vase_vllm.policies"
DEFAULT_POLICY = "vase"
OURS = {
    "cur": "vase_vllm.policies.cur:CURPolicy",
    "distinct": "vase_vllm.policies.distinct:DistinctPolicy",
    "expected": "vase_vllm.policies.expected:ExpectedPolicy",
    "h2o": "vase_vllm.policies.h2o:H2OPolicy",
    "random": "vase_vllm.policies.random:RandomPolicy",
    "rkv": "vase_vllm.policies.rkv:RKVPolicy",
    "snapkv": "vase_vllm.policies.snapkv:SnapKVPolicy",
    "streaming": "vase_vllm.policies.streaming:StreamingPolicy",
    "triattention": "vase_vllm.policies.triattention:TriAttentionPolicy",
    "vase": "vase_vllm.policies.vase:VasePolicy",
}
"""Name to class; the class is imported when it is first used."""


@cache
def _found() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, value, GROUP) for name, value in OURS.items()}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise EvictionError(
                f"--kv-eviction: {point.name!r} is defined twice, by {other.value} and "
                f"{point.value}: uninstall one"
            )
    return found


def policy_names() -> tuple[str, ...]:
    """The names that ``--kv-eviction`` takes besides ``none``; the default comes first."""
    return tuple(sorted(_found(), key=lambda name: (name != DEFAULT_POLICY, name)))


def find_policy(name: str) -> type[Policy]:
    """The class of a policy.

    Raises:
        EvictionError: no policy has this name, or its entry point does not name a policy.
    """
    if not isinstance(name, str):
        raise EvictionError(
            f"--kv-eviction-config.policy: must be the name of a policy, got {name!r}; the "
            f"policies are {', '.join(policy_names())}"
        )
    if name not in _found():
        raise EvictionError(
            f"--kv-eviction {name}: unknown policy; the policies are {', '.join(policy_names())}"
        )
    policy = _found()[name].load()
    if not (isinstance(policy, type) and issubclass(policy, Policy) and policy.name == name):
        raise EvictionError(
            f"--kv-eviction {name}: {_found()[name].value} is not a Policy of that name; "
            "fix the package's entry point"
        )
    return policy
