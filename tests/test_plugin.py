"""The entry point: which vLLM it works with, and that it applies once."""

from importlib.metadata import entry_points

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from vase_vllm import plugin
from vase_vllm.integration import patches


def test_vllm_finds_the_plugin():
    (entry,) = entry_points(group="vllm.general_plugins", name="vase")
    assert entry.load() is plugin.register


def test_the_installed_vllm_is_supported():
    assert plugin.supported_vllm().contains(vllm.__version__, prereleases=True)


def test_applying_twice_changes_nothing():
    plugin.register()
    once = EngineArgs.create_engine_config, EngineArgs.add_cli_args
    plugin.register()
    assert once == (EngineArgs.create_engine_config, EngineArgs.add_cli_args)


@pytest.mark.parametrize("other", ["0.31.9", "0.33.0", "1.0"])
def test_another_vllm_is_left_alone_with_a_warning(monkeypatch, other):
    warnings = []
    monkeypatch.setattr(vllm, "__version__", other)
    monkeypatch.setattr(patches, "apply", lambda: pytest.fail("patched"))
    logger = type("Logger", (), {"warning": lambda self, *args: warnings.append(args)})()
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    plugin.register()
    ((message, *arguments),) = warnings
    text = message % tuple(arguments)
    assert f"found {other}" in text
    assert "supports vllm==0.32.*" in text
    assert "\n" not in text
