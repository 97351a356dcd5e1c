"""What the launches of an eviction from one sequence of Qwen3-8B take, predicted for a GPU."""

from benchmarks.kernels.machine_code import Loop, MachineCode
from benchmarks.kernels.machine_code_report import Prediction, Row
from benchmarks.kernels.prediction import Gpu, LoopCost
from benchmarks.kernels.selection_parts import selection_parts
from benchmarks.kernels.shipped import BUDGET, NUM_KV_HEADS, NUM_LAYERS
from benchmarks.kernels.whitening_parts import whitening_parts
from vase_vllm.kernels.distinctness import token_distinctness
from vase_vllm.kernels.launch import Launch
from vase_vllm.kernels.scoring import candidate_scores
from vase_vllm.kernels.selection import select_and_move
from vase_vllm.kernels.whitening import window_whitening
from vase_vllm.layout.arithmetic import cdiv


def predict_scoring(
    policy: str, launch: Launch, launches: list[Launch], loop: Loop, row: Row, gpu: Gpu
) -> Prediction:
    """What the launches of a kernel that scores take, in all.

    Args:
        policy: under which they run.
        launch: one of them.
        launches: all of the eviction.
        loop: over tiles of K, or of V.
        row: what came out for the kernel.
        gpu: that would run them.
    """
    arguments = launch.arguments
    same = [other for other in launches if other.kernel is launch.kernel]
    num_tiles = cdiv(cdiv(BUDGET, arguments["KEY_TILE"]), arguments["num_splits"])
    num_bytes = NUM_LAYERS * NUM_KV_HEADS * BUDGET * arguments["HEAD_SIZE"] * 2
    if launch.kernel is candidate_scores:
        # Every chunk of the query rows reads K, and all of them together may read V.
        num_bytes *= len(same) + (arguments["VALUE_TILE"] > 0)
    elif launch.kernel is token_distinctness:
        # Keys and values, for each tile of the basis.
        num_bytes *= 2 * len(same)
    operations = 2 * rows_multiplied(launch) * arguments["KEY_TILE"] * arguments["HEAD_SIZE"]
    cost = LoopCost(
        num_programs=sum(other.num_programs for other in same),
        rounds=num_tiles,
        operations=operations,
        num_bytes=num_bytes,
        num_warps=row.warps,
        programs_per_sm=row.programs,
    )
    microseconds = cost.microseconds(loop, gpu)
    return Prediction(row.arch, gpu.name, policy, row.kernel, microseconds)


def rows_multiplied(launch: Launch) -> int:
    """Vectors that a program multiplies every key or value of its tile with."""
    if launch.kernel is token_distinctness:
        # The rows of a basis in two parts.
        return 2 * launch.arguments["ROW_TILE"]
    return launch.arguments.get("QUERY_TILE", 0)


def has_parts(launch: Launch) -> bool:
    """Whether a launch's kernel is predicted by the parts that its programs run."""
    return launch.kernel in (select_and_move, window_whitening)


def predict_parts(policy: str, launch: Launch, code: MachineCode, row: Row, gpu: Gpu) -> Prediction:
    """What the launch of ``select_and_move`` or of ``window_whitening`` takes.

    Args:
        policy: under which it runs.
        launch: itself.
        code: of the kernel.
        row: what came out for it.
        gpu: that would run it.

    Raises:
        ValueError: the machine code is not made of the parts that are known.
    """
    if launch.kernel is select_and_move:
        parts = selection_parts(code, launch.arguments, BUDGET, launch.num_programs)
    else:
        parts = whitening_parts(code, launch.arguments)
    num = launch.num_programs
    if launch.is_beside:
        times = [part.microseconds_beside(num, row.warps, gpu) for part in parts]
    else:
        times = [part.microseconds(num, row.warps, row.programs, gpu) for part in parts]
    return Prediction(
        row.arch,
        gpu.name,
        policy,
        row.kernel,
        sum(times),
        tuple((part.name, part.rounds, part.issued) for part in parts),
    )
