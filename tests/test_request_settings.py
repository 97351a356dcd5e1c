"""A request's own settings of eviction: what they become, and which are refused."""

import pytest

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.request_settings import settings_of_request, wants_report

SERVER = EvictionConfig.parse({"policy": "vase", "budget": 96, "window": 16})


@pytest.mark.parametrize("extra_args", [None, {}, {"my_logits_processor": 3}])
def test_without_settings_of_its_own_a_request_has_the_servers(extra_args):
    assert settings_of_request(SERVER, extra_args) is SERVER


def test_a_request_that_opts_out():
    assert settings_of_request(SERVER, {"kv_eviction": "none"}) is None


def test_a_report_is_no_setting():
    asks = {"kv_eviction_report": True}
    assert settings_of_request(SERVER, asks) == SERVER
    assert settings_of_request(SERVER, asks | {"kv_eviction": "none"}) is None
    assert wants_report(asks)
    assert not wants_report({"kv_eviction_report": False})
    assert not wants_report(None)


def test_what_a_request_may_choose():
    own = settings_of_request(
        SERVER, {"kv_eviction": "vase", "kv_eviction_budget": 48, "kv_eviction_prompt": "keep"}
    )
    assert (own.budget, own.prompt) == (48, "keep")
    assert own.policy == SERVER.policy
    assert own.schedule.for_prompt(100).budget == 148
    assert own.schedule.first_eviction(100) == 100 + 48 + 16


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"kv_eviction": "rkv"}, "kv_eviction: must be none or vase, the policy of this server"),
        ({"kv_eviction": True}, "kv_eviction: must be none or vase"),
        ({"kv_eviction_budget": 97}, "kv_eviction_budget: must be an integer above window (16)"),
        ({"kv_eviction_budget": 16}, "kv_eviction_budget: must be an integer above window (16)"),
        ({"kv_eviction_budget": "64"}, "up to the server's budget (96), got '64'"),
        ({"kv_eviction_budget": True}, "up to the server's budget (96), got True"),
        ({"kv_eviction_budget": [64]}, "up to the server's budget (96), got [64]"),
        ({"kv_eviction_prompt": "both"}, "kv_eviction_prompt: must be evict or keep, got 'both'"),
        ({"kv_eviction_prompt": ["keep"]}, "kv_eviction_prompt: must be evict or keep"),
        ({"kv_eviction_report": "yes"}, "kv_eviction_report: must be true or false, got 'yes'"),
        ({"kv_eviction_sinks": 4}, "kv_eviction_sinks: unknown key; the keys are kv_eviction, "),
        (
            {"kv_eviction": "none", "kv_eviction_budget": 64},
            "kv_eviction_budget: has no effect with kv_eviction none",
        ),
        # Together with the server's other settings: 24 tokens cannot hold 16 and 18 protected.
        ({"kv_eviction_budget": 18}, "sinks (4) must be at most budget - window (2)"),
    ],
)
def test_what_is_refused(extra_args, message):
    with pytest.raises(EvictionError) as error:
        settings_of_request(SERVER, extra_args)
    assert str(error.value).startswith("vllm_xargs.kv_eviction")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bounded_prefill_keeps_no_prompt():
    bounded = EvictionConfig.parse({"budget": 96, "window": 16, "prefill": "bounded"})
    with pytest.raises(EvictionError, match="set prefill dense or prompt evict"):
        settings_of_request(bounded, {"kv_eviction_prompt": "keep"})
    with pytest.raises(EvictionError, match="--kv-eviction-config: prefill bounded"):
        EvictionConfig.parse({"prefill": "bounded", "prompt": "keep"})
