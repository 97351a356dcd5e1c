"""Whatever a user or a client writes as settings is either taken or refused in one line."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from vase_vllm.config import EvictionConfig, settings_keys
from vase_vllm.errors import EvictionError
from vase_vllm.policies.registry import find_policy, policy_names
from vase_vllm.request_settings import KEYS, settings_of_request

KEYS_OF_SETTINGS = sorted(
    {"policy", *EvictionConfig.model_fields}.union(
        *(settings_keys(find_policy(name)) for name in policy_names())
    )
)
WORDS = ["bounded", "dense", "keep", "evict", "none", "gumbel", "greedy", *policy_names()]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 200)
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS)
SERVER = EvictionConfig.parse({"policy": "vase", "budget": 96, "window": 16})


def taken(function, *arguments):
    """What a function makes of settings, or the message with which it refuses them."""
    try:
        return function(*arguments), None
    except EvictionError as error:
        return None, str(error)


@settings(max_examples=2000, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS_OF_SETTINGS) | st.text(max_size=8), VALUES, max_size=6))
def test_any_settings(found):
    config, message = taken(EvictionConfig.from_additional, {"kv_eviction": found})
    if message is not None:
        assert "\n" not in message
        assert "kv" in message
    if config is not None:
        assert 0 <= config.sinks <= config.budget - config.window < config.budget
        # What was taken can be written down, and read again as the same.
        own = config.model_dump(exclude={"policy"}) | config.policy.model_dump(by_alias=True)
        again = json.loads(json.dumps(own | {"policy": config.policy.name}))
        assert EvictionConfig.parse(again) == config


@settings(max_examples=1000, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(KEYS) | st.text(max_size=8).map("kv_evict".__add__), VALUES, max_size=4
    )
)
def test_any_settings_of_a_request(found):
    own, message = taken(settings_of_request, SERVER, found)
    if message is not None:
        assert "\n" not in message
        assert message.startswith("vllm_xargs.")
    assert own is None or SERVER.window < own.budget <= SERVER.budget
