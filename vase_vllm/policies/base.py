"""The interface of a policy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.policies.candidates import Candidates


@dataclass(frozen=True)
class AttentionShape:
    """The shape of a whole model's attention, however it is distributed over devices."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.num_query_heads} query heads and "
            f"{self.num_kv_heads} KV heads of size {self.head_size}"
        )


class Policy(BaseModel, ABC):
    """Ranks the candidates of an eviction.

    A subclass's fields are its keys in ``--kv-eviction-config``, checked by pydantic; its
    docstring's first line is what ``vllm serve --help`` says about it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )

    name: ClassVar[str]
    """The name that ``--kv-eviction`` takes, and that of the entry point."""

    @property
    def num_numbers(self) -> int:
        """fp32 numbers that every token carries from one eviction to the next, for :meth:`rank`."""
        return 0

    @abstractmethod
    def priority(self, candidates: Candidates) -> torch.Tensor:
        """Rank the candidates, each KV head for itself.

        The ``budget - window`` largest of each head survive, ties going to the lower slot. The
        sinks and a prompt that is kept survive whatever is returned for them.

        Returns:
            [H, n] floating point, in which NaN counts as -inf. It must be a new tensor, for the
            caller writes to it.
        """

    def rank(
        self, candidates: Candidates, numbers: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rank the candidates, and say which numbers go on with each token.

        A policy without such numbers overrides :meth:`priority` alone.

        Args:
            numbers: [H, num_numbers, n] fp32, what this returned for the candidates at the last
                eviction, wherever they lie now; 0 in the slots of a kept prompt. None at a
                sequence's first eviction, and where the policy keeps no numbers.

        Returns:
            What :meth:`priority` returns, and [H, num_numbers, n + W] fp32, of the candidates and
            of the window in order of position, or None. Those of the survivors are kept.
        """
        return self.priority(candidates), None

    def check(self, limits: EvictionLimits) -> None:
        """Check that the policy's keys go together with the budget.

        Raises:
            ValueError: one line that names the key and the remedy.
        """

    def check_model(self, shape: AttentionShape) -> None:
        """Check that the policy can rank the tokens of a model; called before it is loaded.

        Raises:
            ValueError: one line that names what does not fit, and the remedy.
        """

    def fused(self, limits: EvictionLimits) -> EvictionParameters | None:
        """The parameters under which the fused GPU kernel computes this ranking, or None.

        With None, a GPU runs :meth:`priority` in plain torch, sequence by sequence.
        """
        return None

    def slot_priority(
        self,
        limits: Sequence[EvictionLimits],
        first: np.ndarray,
        eviction_index: np.ndarray,
        num_candidates: int,
    ) -> np.ndarray | None:
        """The ranking where it follows from the schedule alone, for the fused kernel to read.

        A policy that is :meth:`fused` with scoring ``age`` returns it before each launch, and the
        worker copies it to the device; all layers and KV heads of a sequence share it.

        Args:
            limits: [due], of each sequence.
            first: [due] int64, position of each sequence's first eviction; 0 in a row that never
                evicts, whose numbers are not read.
            eviction_index: [due] int64, evictions that each sequence has had before.
            num_candidates: n, the most that any of the sequences has.

        Returns:
            [due, n] int32, the priority of each candidate in slot order; None with any other
            scoring, where the kernel ranks by what it reads and draws itself.
        """
        return None


class AttentionPolicy(Policy):
    """A policy that ranks by the attention of the window's queries."""

    smoothing: int = Field(default=5, ge=1)
    """Width of the average pooling of the attention over slots; 1 is off."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Divides the attention logits before the softmax."""

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        if self.smoothing % 2 == 0:
            raise ValueError(f"smoothing ({self.smoothing}) must be odd: use 1 to switch it off")

    def attention(self, candidates: Candidates) -> torch.Tensor:
        """Mean attention of the window to each candidate: [H, n] fp32."""
        return candidates.attention(self.smoothing, self.temperature)
