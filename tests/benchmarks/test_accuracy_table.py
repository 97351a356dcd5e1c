"""The page of all policies, from the results that are committed."""

from benchmarks.accuracy import table
from vase_vllm.policies.registry import policy_names


def test_the_page_has_every_policy_and_is_the_committed_one():
    page = table.page()
    likelihood, others = page.split("## Questions of the testbed")
    for name in policy_names():
        assert f"| `{name}` |" in likelihood
        assert f"| `{name}` |" in others
    assert "`vase`, smoothing 1" in likelihood
    # Rules that are no policies have a page of their own.
    assert "survivors" not in likelihood.split("| policy |")[1]
    assert page.count("Published, not measured by us") == 2
    assert (table.RESULTS / "policies.md").read_text() == page
