"""``--kv-eviction`` and ``--kv-eviction-config``: what they take, and what they become."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from vllm.engine.arg_utils import optional_type

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.policies.registry import find_policy, policy_names


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, in a group of their own, as vLLM's own configs have them."""
    group = parser.add_argument_group(title="KVEvictionConfig", description=_describe_keys())
    group.add_argument(
        "--kv-eviction",
        choices=("none", *policy_names()),
        default="none",
        help=f"Bound the KV cache of every sequence by evicting tokens. {_describe_policies()}",
    )
    group.add_argument(
        "--kv-eviction-config",
        type=optional_type(json.loads),
        default=None,
        help="Settings of --kv-eviction: a JSON string or dotted keys, such as "
        "--kv-eviction-config.budget 2048.",
    )


def settings_of(policy: str, settings: Any) -> dict[str, Any]:
    """The settings that the two flags ask for, ``policy`` among them.

    Args:
        policy: the value of ``--kv-eviction``.
        settings: that of ``--kv-eviction-config``; None without the flag.

    Raises:
        EvictionError: the two flags do not go together.
    """
    if policy == "none":
        raise EvictionError(
            "--kv-eviction-config has no effect without --kv-eviction: "
            "add --kv-eviction vase or remove it"
        )
    if not isinstance(settings, Mapping | None):
        raise EvictionError("--kv-eviction-config: must be a JSON object")
    if settings and "policy" in settings:
        raise EvictionError(
            "--kv-eviction-config.policy: the policy is --kv-eviction's value; remove the key"
        )
    return {"policy": policy, **(settings or {})}


def _describe_policies() -> str:
    """Each policy and the first line of its docstring."""
    docs = {name: find_policy(name).__doc__ or "" for name in policy_names()}
    return " ".join(f"`{name}`: {doc.partition(chr(10))[0]}" for name, doc in docs.items())


def _describe_keys() -> str:
    """The keys, defaults and meanings of the settings, from where they are defined."""
    parts = [f"Keys of --kv-eviction-config, with their defaults: {_keys(EvictionConfig)}"]
    policies = {name: find_policy(name) for name in policy_names()}
    parts += [f"Of {name}: {_keys(each)}" for name, each in policies.items() if each.model_fields]
    return " ".join(parts)


def _keys(model: type[BaseModel]) -> str:
    return " ".join(
        f"`{field.alias or name}` ({field.default}): {field.description}"
        for name, field in model.model_fields.items()
        if name != "policy"
    )
