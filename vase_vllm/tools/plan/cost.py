"""Counts what one decode step costs: the bytes moved and the operations, per GPU.

A decode step reads all weights and all cached bytes once, and does little arithmetic with them
(Pope et al., Efficiently Scaling Transformer Inference, arXiv 2211.05102, section 3). It has three
parts, the linear layers, attention and eviction. The first two are bound by memory or by arithmetic
(the roofline model: Williams et al., CACM 52(4), 2009); an eviction takes both, one after the other
(measured on an H200: ``docs/scaling.md``)::

    time = overhead + sum over layers and attention of max(bytes / bandwidth, operations / peak)
         + bytes / bandwidth + operations / peak of eviction + communication

Symbols of the formulas: B batch, n mean number of cached tokens of a sequence, l layers, H KV heads
and Q query heads *of one GPU*, D head size, e bytes of an element, T budget, W window.

This module imports neither vLLM nor torch.
"""

from dataclasses import dataclass

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.schedule import EvictionSchedule


@dataclass(frozen=True)
class ModelShape:
    """A model as it is served, before it is split over GPUs.

    Attributes:
        num_layers: attention layers (l); each has a KV cache.
        num_query_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_size: D.
        hidden_size: width of the residual stream.
        element_size: bytes of an element of the KV cache and of the activations (e).
        num_params: parameters.
        weight_bytes: bytes of all weights.
        lookup_fraction: share of the weights of which a step reads single rows only: the input
            embedding, unless it is tied to the output head.
        expert_fraction: share of the weights that belongs to routed experts.
        num_experts: routed experts of a layer, 0 in a dense model.
        num_experts_per_token: routed experts per token.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    element_size: int
    num_params: int
    weight_bytes: int
    lookup_fraction: float = 0.0
    expert_fraction: float = 0.0
    num_experts: int = 0
    num_experts_per_token: int = 0


@dataclass(frozen=True)
class Machine:
    """Speeds of a GPU, and the fixed costs of a step.

    Attributes:
        bandwidth: bytes per second from and to memory.
        peak: operations per second of the matrix units; a multiply-add counts as two.
        overhead: seconds of a step that are independent of bytes and operations.
        link_bandwidth: bytes per second to other GPUs, in each direction.
        link_latency: seconds of one small all-reduce.
    """

    bandwidth: float
    peak: float = float("inf")
    overhead: float = 0.0
    link_bandwidth: float = float("inf")
    link_latency: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of a step: the bytes that it moves from and to memory, and its operations.

    Attributes:
        overlaps: whether it computes while it moves bytes, or takes the time of both.
    """

    num_bytes: float = 0.0
    operations: float = 0.0
    overlaps: bool = True

    def seconds(self, machine: Machine) -> float:
        moving, computing = self.num_bytes / machine.bandwidth, self.operations / machine.peak
        return max(moving, computing) if self.overlaps else moving + computing


@dataclass(frozen=True)
class Step:
    """A decode step on one GPU.

    Attributes:
        linear: the linear layers, which read the weights.
        attention: attention, which reads the KV cache.
        eviction: the evictions' share of a step; a sequence evicts every W steps.
        all_reduces: number of all-reduces of activations between GPUs.
        all_reduce_bytes: bytes that one all-reduce sends and receives.
    """

    linear: Part
    attention: Part
    eviction: Part
    all_reduces: int = 0
    all_reduce_bytes: float = 0.0

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.linear, self.attention, self.eviction

    @property
    def num_bytes(self) -> float:
        return sum(part.num_bytes for part in self.parts)

    @property
    def operations(self) -> float:
        return sum(part.operations for part in self.parts)

    def seconds(self, machine: Machine) -> float:
        each = machine.link_latency + self.all_reduce_bytes / machine.link_bandwidth
        parts = sum(part.seconds(machine) for part in self.parts)
        return machine.overhead + parts + self.all_reduces * each


@dataclass(frozen=True)
class Shard:
    """One GPU's part of a model under tensor parallelism, which splits heads and weights.

    With more GPUs than KV heads, the KV heads are replicated, as in vLLM. The few weights that vLLM
    replicates on every GPU (norms, and those KV heads) are counted as split.

    Raises:
        ValueError: the heads cannot be split over so many GPUs.
    """

    model: ModelShape
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        tp, queries, keys = (
            self.tensor_parallel_size,
            self.model.num_query_heads,
            self.model.num_kv_heads,
        )
        if tp < 1 or queries % tp or (keys % tp and tp % keys):
            raise ValueError(
                f"{queries} query heads and {keys} KV heads cannot be split over {tp} GPUs: "
                "change --tensor-parallel-size"
            )

    @property
    def num_kv_heads(self) -> int:
        return max(1, self.model.num_kv_heads // self.tensor_parallel_size)

    @property
    def num_query_heads(self) -> int:
        return self.model.num_query_heads // self.tensor_parallel_size

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def weight_bytes(self) -> float:
        return self.model.weight_bytes / self.tensor_parallel_size

    @property
    def kv_bytes_per_token(self) -> int:
        """``2 l H D e``."""
        return 2 * self._elements_per_token(self.num_kv_heads)

    @property
    def cell_bytes(self) -> int:
        """A key and a value of one KV head: ``2 D e``."""
        return 2 * self.model.head_size * self.model.element_size

    @property
    def query_bytes_per_token(self) -> int:
        """Bytes of a token's queries in the query ring: ``l Q D e``."""
        return self._elements_per_token(self.num_query_heads)

    def _elements_per_token(self, num_heads: int) -> int:
        return self.model.num_layers * num_heads * self.model.head_size * self.model.element_size

    def weight_bytes_read(self, batch: float) -> float:
        """Bytes of weights that a step reads.

        An expert is read if at least one token is routed to it. With even routing, that is
        ``1 - (1 - k / E)^B`` of E experts at k per token.
        """
        model = self.model
        always = 1 - model.lookup_fraction - model.expert_fraction
        if not model.num_experts:
            return always * self.weight_bytes
        visited = 1 - (1 - model.num_experts_per_token / model.num_experts) ** batch
        return (always + visited * model.expert_fraction) * self.weight_bytes

    def linear_operations(self, batch: float) -> float:
        """Operations of the linear layers: two per token and parameter that it uses."""
        model = self.model
        met = 1 - model.lookup_fraction - model.expert_fraction
        if model.num_experts:
            met += model.expert_fraction * model.num_experts_per_token / model.num_experts
        return 2 * batch * met * model.num_params / self.tensor_parallel_size

    def step(
        self,
        batch: float,
        num_cached: float,
        schedule: EvictionSchedule | None = None,
        evicting: float = 1.0,
    ) -> Step:
        """Count a decode step of ``batch`` sequences.

        Attention reads ``B n`` tokens, writes B, and takes ``4 n l Q D`` operations per sequence: a
        multiply-add each for scores and values. Eviction also stores the queries of every step.

        Args:
            batch: number of sequences.
            num_cached: mean number of tokens that a sequence attends to.
            schedule: schedule of the evictions, or None for the full cache.
            evicting: share of the sequences that have reached their first eviction.
        """
        tp, model = self.tensor_parallel_size, self.model
        per_cached = 4 * model.num_layers * self.num_query_heads * model.head_size
        eviction = Part()
        if schedule is not None:
            one = self.eviction(schedule)
            eviction = Part(
                batch * (evicting * one.num_bytes / schedule.window + self.query_bytes_per_token),
                batch * evicting * one.operations / schedule.window,
                overlaps=False,
            )
        return Step(
            linear=Part(self.weight_bytes_read(batch), self.linear_operations(batch)),
            attention=Part(
                batch * (num_cached + 1) * self.kv_bytes_per_token, batch * num_cached * per_cached
            ),
            eviction=eviction,
            all_reduces=2 * model.num_layers if tp > 1 else 0,
            all_reduce_bytes=2 * (tp - 1) / tp * batch * model.hidden_size * model.element_size,
        )

    def eviction(self, schedule: EvictionSchedule) -> Part:
        """Count one eviction of one sequence in the steady state, with T candidates.

        The keys of the candidates are read twice and their values once, which is ``3/2 T`` tokens.
        The W newest are copied, that is read and written, and the ring's W queries are read. These
        queries are multiplied with the keys twice: ``2 * 2 W T D`` operations per query head and
        layer.
        """
        budget, window = schedule.budget, schedule.window
        num_bytes = (1.5 * budget + 2 * window) * self.kv_bytes_per_token
        num_heads = self.model.num_layers * self.num_query_heads
        operations = 4 * window * budget * self.model.head_size * num_heads
        num_bytes += window * self.query_bytes_per_token
        return Part(num_bytes, operations, overlaps=False)


def mean_cached(prompt: int, output: int, schedule: EvictionSchedule | None = None) -> float:
    """Mean number of tokens that a sequence attends to, over its ``output`` decode steps.

    The step of position p attends to p + 1 tokens, or to its slot + 1 tokens after an eviction.

    Args:
        prompt: prompt tokens.
        output: generated tokens.
        schedule: schedule of the evictions, or None for the full cache.
    """
    first = prompt + output if schedule is None else schedule.first_eviction(prompt)
    growing = min(output, max(first - prompt, 0))
    total = growing * prompt + growing * (growing + 1) / 2
    if schedule is not None:
        periods, rest = divmod(output - growing, schedule.window)
        cycle = schedule.window * (schedule.window + 1) / 2
        total += (output - growing) * schedule.budget + periods * cycle + rest * (rest + 1) / 2
    return total / output


def evicting_fraction(prompt: int, output: int, schedule: EvictionSchedule) -> float:
    """Share of a sequence's decode steps that come after its first eviction."""
    return max(0, prompt + output - schedule.first_eviction(prompt)) / output


def num_blocks_held(
    num_tokens: int,
    block_size: int,
    schedule: EvictionSchedule | None = None,
    num_state_blocks: int = 0,
    first: int = 0,
) -> int:
    """Number of KV cache blocks of a sequence whose next step ends at ``num_tokens`` tokens.

    Args:
        num_tokens: tokens of the sequence after the step.
        block_size: token slots of a block.
        schedule: schedule of the evictions, or None for the full cache.
        num_state_blocks: blocks of the sequence's query ring.
        first: position of the first eviction; 0 stands for that of a prompt within the budget.
    """
    if schedule is None:
        return cdiv(num_tokens, block_size)
    first = first or schedule.bound
    if num_tokens > first:
        # What a long prompt held above the bound has been given back.
        return num_state_blocks + cdiv(schedule.bound, block_size)
    return schedule.num_row_blocks(num_tokens, first, block_size, num_state_blocks)
