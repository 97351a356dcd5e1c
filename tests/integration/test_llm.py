"""``vase_vllm.LLM``: the flags as arguments. The end-to-end tests make their engines with it."""

import subprocess
import sys

import pytest
import vllm

import vase_vllm
from vase_vllm.errors import EvictionError


@pytest.fixture
def given(monkeypatch):
    """What vLLM's own class is given."""
    seen = {}
    monkeypatch.setattr(vllm.LLM, "__init__", lambda self, *args, **kwargs: seen.update(kwargs))
    return seen


@pytest.mark.parametrize(
    ("arguments", "additional"),
    [
        ({"kv_eviction": "rkv"}, {"kv_eviction": {"policy": "rkv"}}),
        (
            {
                "kv_eviction": "vase",
                "kv_eviction_config": {"budget": 512},
                "additional_config": {"other": 1},
            },
            {"other": 1, "kv_eviction": {"policy": "vase", "budget": 512}},
        ),
    ],
    ids=["policy", "settings"],
)
def test_arguments_are_what_the_flags_are(given, arguments, additional):
    vase_vllm.LLM("model", **arguments, seed=1)
    assert given == {"additional_config": additional, "seed": 1}


@pytest.mark.parametrize("own", [{}, {"additional_config": {"other": 1}}], ids=str)
def test_without_them_it_is_the_class_of_vllm(given, own):
    vase_vllm.LLM("model", **own)
    assert given == own
    assert issubclass(vase_vllm.LLM, vllm.LLM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_eviction_config": {"budget": 512}}, "add --kv-eviction vase"),
        ({"kv_eviction": "vase", "kv_eviction_config": [4]}, "must be a JSON object"),
        ({"kv_eviction": "vase", "kv_eviction_config": {"policy": "rkv"}}, "remove the key"),
    ],
    ids=["no policy", "not an object", "policy twice"],
)
def test_what_the_flags_refuse_is_refused(given, arguments, message):
    with pytest.raises(EvictionError, match=message):
        vase_vllm.LLM("model", **arguments)


def test_a_wrong_name_is_an_attribute_error_and_the_package_stays_light():
    program = (
        "import sys, vase_vllm\n"
        "assert not hasattr(vase_vllm, 'LLMs')\n"
        "assert not {'torch', 'vllm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
