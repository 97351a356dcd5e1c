"""EvictionConfig: defaults, refusals in one line, documentation."""

import pytest

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.policies.registry import find_policy, policy_names


def test_defaults_are_those_of_the_paper():
    config = EvictionConfig()
    assert (config.budget, config.window, config.sinks, config.seed) == (4096, 64, 4, 0)
    policy = config.policy
    assert (policy.name, policy.num_protected(config.limits)) == ("vase", 1024)
    assert (policy.smoothing, policy.temperature, policy.sampling) == (5, 1.0, "gumbel")
    assert (policy.magnitude, policy.protect, policy.evict_large) == ("range", "large", False)


@pytest.mark.parametrize(
    ("protected", "count"), [(0.25, 250), (0.5, 500), (7, 7), (0.0041, 4), (1, 1)]
)
def test_protected_is_a_fraction_or_a_count(protected, count):
    config = EvictionConfig.parse({"budget": 1000, "protected": protected, "sinks": 0})
    assert config.policy.num_protected(config.limits) == count


@pytest.mark.parametrize(
    ("settings", "setting", "remedy"),
    [
        ({"budget": 64}, "budget (64)", "raise budget"),
        ({"budget": 0}, "--kv-eviction-config.budget", "greater than 0"),
        ({"budget": "many"}, "--kv-eviction-config.budget", "'many'"),
        ({"budget": 1.5}, "--kv-eviction-config.budget", "integer"),
        ({"window": 0}, "--kv-eviction-config.window", "greater than 0"),
        ({"protected": 4090}, "protected (4090 tokens)", "lower protected"),
        ({"protected": 1.5}, "protected (1.5)", "fraction up to 1"),
        ({"protected": -1}, "--kv-eviction-config.protected", "greater than or equal to 0"),
        ({"protected": 2}, "protected (2 tokens)", "lower sinks"),
        ({"smoothing": 4}, "smoothing (4)", "odd"),
        ({"temperature": 0}, "--kv-eviction-config.temperature", "greater than or equal to 0.001"),
        ({"temperature": 1e-40}, "--kv-eviction-config.temperature", "0.001, got 1e-40"),
        ({"temperature": 1e300}, "--kv-eviction-config.temperature", "equal to 1000, got 1e+300"),
        ({"sampling": "top"}, "--kv-eviction-config.sampling", "'gumbel' or 'greedy'"),
        ({"seed": -1}, "--kv-eviction-config.seed", "greater than or equal to 0"),
        ({"seed": 2**64}, "--kv-eviction-config.seed", "less than"),
        ({"budgets": 9}, "--kv-eviction-config.budgets", "unknown key; the keys are budget,"),
        ({"sinks": 4090, "protected": 4090}, "sinks (4090)", "lower sinks"),
        (
            {"admission": "never"},
            "--kv-eviction-config.admission",
            "'expected', 'reserve' or 'optimistic'",
        ),
        (
            {"policy": "lru"},
            "--kv-eviction lru",
            "the policies are vase, cur, distinct, expected",
        ),
        ({"policy": "snapkv", "protected": 9}, "protected", "the keys are budget,"),
        ({"policy": "snapkv", "smoothing": 2}, "smoothing (2)", "odd"),
        ({"policy": "rkv", "lambda": 2}, "--kv-eviction-config.lambda", "less than or equal to 1"),
        ({"policy": "distinct", "protected": 1.5}, "protected (1.5)", "fraction up to 1"),
        ({"policy": "distinct", "strata": 65}, "strata (65)", "lower strata"),
        ({"policy": "distinct", "ridge": 0}, "ridge", "greater than or equal to 0.0001"),
        ({"policy": "cur", "gaussian": "new"}, "gaussian", "'fixed' or 'redrawn'"),
        ({"evict_large": True, "magnitude": "none"}, "evict_large", "set magnitude"),
        ({"protect": "random", "magnitude": "none"}, "magnitude none", "remove magnitude"),
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_line(settings, setting, remedy):
    with pytest.raises(ValueError) as error:
        EvictionConfig.parse(settings)
    message = str(error.value)
    assert "\n" not in message
    assert setting in message
    assert remedy in message


@pytest.mark.parametrize("given", [True, 1, "vase", ["vase"], {}], ids=str)
def test_settings_of_a_wrong_type_are_refused_in_one_line(given):
    with pytest.raises(EvictionError) as error:
        EvictionConfig.from_additional({"kv_eviction": given})
    message = str(error.value)
    assert message.startswith("additional_config['kv_eviction'] must be an object")
    assert repr(given) in message
    assert "\n" not in message


@pytest.mark.parametrize("policy", [["vase"], {}, 3, None], ids=str)
def test_a_policy_that_is_no_name_is_refused_in_one_line(policy):
    with pytest.raises(EvictionError, match=r"^--kv-eviction-config.policy: must be the name"):
        EvictionConfig.from_additional({"kv_eviction": {"policy": policy}})


@pytest.mark.parametrize("additional", [{}, {"kv_eviction": None}, None, "text"], ids=str)
def test_eviction_is_off_where_it_is_not_asked_for(additional):
    assert EvictionConfig.from_additional(additional) is None


def test_settings_are_parsed_once_per_process(monkeypatch):
    additional = {"kv_eviction": {"policy": "vase", "budget": 4321}}
    first = EvictionConfig.from_additional(additional)
    monkeypatch.setattr(EvictionConfig, "parse", lambda *_: pytest.fail("parsed again"))
    assert EvictionConfig.from_additional(additional) is first


def test_every_key_is_documented():
    for model in (EvictionConfig, *map(find_policy, policy_names())):
        assert model.__doc__
        assert all(field.description for field in model.model_fields.values())


def test_all_settings_are_in_the_log_line():
    config = EvictionConfig.parse({"policy": "rkv", "budget": 128, "lambda": 0.1})
    assert "budget=128" in str(config)
    assert "lambda=0.1" in str(config)
