"""vLLM has what the plugin uses, with the same parameters and fields; by name where it has not.

``make contract VLLM=0.33.0`` runs this against the sources in another version's wheel.
"""

import json
import os
from pathlib import Path

import pytest

from tests.contract.sources import Sources
from tests.contract.uses import TABLE, installed, uses

AGREED: dict[str, str] = json.loads(TABLE.read_text())
OTHER = os.environ.get("VLLM_SOURCES")


@pytest.fixture(scope="module")
def vllm():
    return Sources(Path(OTHER) if OTHER else installed())


@pytest.mark.parametrize("symbol", AGREED)
def test_vllm_keeps_to_what_was_agreed(vllm, symbol):
    assert vllm.describe(symbol) == AGREED[symbol]


@pytest.mark.skipif(OTHER is not None, reason="the table is that of the installed vLLM")
def test_the_table_is_complete(vllm):
    assert uses(vllm) == AGREED.keys()


def test_a_change_is_seen(tmp_path):
    package = tmp_path / "vllm"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('LAZY = {"LLM": ".inner.llm:LLM"}\n')
    (package / "inner" / "__init__.py").write_text("from .llm import Base, helper as help\n")
    (package / "inner" / "llm.py").write_text(
        "class Base:\n"
        "    size: int = 3\n"
        "    def run(self, a, /, b=1, *, c, **kw):\n"
        "        self.ran = True\n"
        "class LLM(Base):\n"
        "    pass\n"
        "if True:\n"
        "    def helper(*args): ...\n"
    )
    found = Sources(tmp_path)
    described = {
        "vllm:LLM": "class",
        "vllm:LLM.run": "(self, a, b=, *, c, **kw)",
        "vllm:LLM.ran": "value",
        "vllm:LLM.gone": None,
        "vllm.inner:Base": "class",
        "vllm:LLM.size": "value",
        "vllm.inner:help": "(*args)",
        "vllm.inner:gone": None,
        "vllm:inner": "module",
        "vllm.gone:anything": None,
    }
    assert {symbol: found.describe(symbol) for symbol in described} == described
