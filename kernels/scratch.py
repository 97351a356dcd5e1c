"""The memory that an eviction works in: what a head needs of it, and who gets which part."""

from dataclasses import dataclass

import torch

from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.layout.arithmetic import cdiv

SCRATCH_BYTES = 64 * 2**20
"""The most scratch memory of a launch that is worth having."""
WORD_BYTES = 4
INTEGERS = ("ordered", "places", "members")
"""Arguments of int32; the others are fp32."""


@dataclass(frozen=True)
class HeadScratch:
    """What decides how much scratch memory a head needs, beside its candidates and their splits.

    Attributes:
        num_rows: query rows of a KV head, G * W; 0 if no attention is scored.
        sample_shape: (W, D) of the window's values where distinctness protects; else None.
        window_scores: words of the scores of the window's own tokens; 0 if nothing remembers them.
        has_strata: whether candidates are divided by their positions.
    """

    num_rows: int = 0
    sample_shape: tuple[int, int] | None = None
    window_scores: int = 0
    has_strata: bool = False

    @classmethod
    def of(cls, parameters: EvictionParameters, group_size: int, head_size: int) -> "HeadScratch":
        """What these parameters need of a layer with G query heads to a KV head, of size D."""
        window = parameters.window
        return cls(
            num_rows=group_size * window if parameters.scoring == "attention" else 0,
            sample_shape=(window, head_size) if parameters.protect_by == "distinctness" else None,
            window_scores=padded_words(window) if parameters.memory else 0,
            has_strata=parameters.strata > 1,
        )

    def words(self, capacity: int, num_splits: int) -> dict[str, int]:
        """Words of four bytes of a head for each argument of the kernels, by its name.

        They are so many that every argument begins at an aligned address, however many heads there
        are: Triton compiles a kernel anew for an address that is not.

        Args:
            capacity: candidates that there is room for, a multiple of 16 (:func:`padded_words`).
            num_splits: programs that share a head's candidates.
        """
        words = {"scores": capacity + self.window_scores, "ordered": capacity}
        words |= dict.fromkeys(("maxima", "sums"), padded_words(num_splits * self.num_rows))
        if self.has_strata:
            words |= dict.fromkeys(("places", "members"), capacity)
        if self.sample_shape is not None:
            window, head_size = self.sample_shape
            words |= {
                "key_means": padded_words(head_size),
                "bases": padded_words(window * head_size),
                # The last, so that nothing that has to be aligned comes after it.
                "floors": 1,
            }
        return words

    def num_bytes(self, capacity: int, num_splits: int) -> int:
        """Bytes of a head."""
        return WORD_BYTES * sum(self.words(capacity, num_splits).values())

    def divide(
        self, memory: torch.Tensor, num_heads: int, capacity: int, num_splits: int
    ) -> dict[str, torch.Tensor]:
        """Divide memory among the arguments of the kernels, for so many heads at once.

        Args:
            memory: [bytes] uint8, with room for all heads.

        Returns:
            By name, each [words] fp32, or int32 (``ordered``, ``places``, ``members``).
        """
        words = {
            name: num_heads * num_words
            for name, num_words in self.words(capacity, num_splits).items()
        }
        used = memory[: WORD_BYTES * sum(words.values())].view(torch.int32)
        parts = dict(zip(words, used.split(list(words.values())), strict=True))
        return {
            name: part if name in INTEGERS else part.view(torch.float32)
            for name, part in parts.items()
        }


def some(scratch: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """The named parts of the scratch memory: the arguments of one kernel."""
    return {name: scratch[name] for name in names}


def padded_words(num_words: int) -> int:
    """The next whole multiple of 16 words, which is 64 bytes.

    >>> padded_words(4000), padded_words(4001)
    (4000, 4016)
    """
    return cdiv(num_words, 16) * 16
