"""CUR's ranking (arXiv 2509.15038): approximate leverage scores of keys and values."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates


class CURPolicy(Policy):
    """Keeps the tokens of the largest leverage, ``|k G|^2 * |v G|^2`` with a Gaussian G (CUR)."""

    name: ClassVar[str] = "cur"

    gaussian: Literal["fixed", "redrawn"] = "redrawn"
    """Whether G stays the same for a sequence or is ``redrawn`` at every eviction."""
    columns: int = Field(default=20, ge=1)
    """Columns of G."""

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        head_size = candidates.keys.shape[1]
        gaussian = candidates.draws.gaussian(
            head_size, self.columns, anew=self.gaussian == "redrawn"
        ) / math.sqrt(self.columns)
        of_keys = (candidates.keys.transpose(-1, -2) @ gaussian).square().sum(dim=-1)
        of_values = candidates.of_values(
            lambda values: (values.float() @ gaussian).square().sum(dim=-1)
        )
        return of_keys * of_values
