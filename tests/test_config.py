"""EvictionConfig: defaults, refusals in one line, documentation."""

import pytest

from vase_vllm.config import EvictionConfig


def test_defaults_are_those_of_the_paper():
    config = EvictionConfig()
    assert (config.budget, config.window, config.num_protected) == (4096, 64, 1024)
    assert (config.sinks, config.smoothing, config.temperature) == (4, 5, 1.0)
    assert (config.sampling, config.seed) == ("gumbel", 0)


@pytest.mark.parametrize(
    ("protected", "count"), [(0.25, 250), (0.5, 500), (7, 7), (0.0041, 4), (1, 1)]
)
def test_protected_is_a_fraction_or_a_count(protected, count):
    config = EvictionConfig(budget=1000, protected=protected, sinks=0)
    assert config.num_protected == count


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
        ({"temperature": 0}, "--kv-eviction-config.temperature", "greater than 0"),
        ({"sampling": "top"}, "--kv-eviction-config.sampling", "'gumbel' or 'greedy'"),
        ({"seed": -1}, "--kv-eviction-config.seed", "greater than or equal to 0"),
        ({"seed": 2**64}, "--kv-eviction-config.seed", "less than"),
        ({"budgets": 9}, "--kv-eviction-config.budgets", "unknown key; the keys are budget,"),
        ({"policy": "lru"}, "--kv-eviction-config.policy", "'vase'"),
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


def test_every_key_is_documented():
    properties = EvictionConfig.model_json_schema()["properties"]
    assert all(field["description"] for field in properties.values())
