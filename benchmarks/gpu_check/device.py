"""Whether the GPU computes, the package can be imported, and vLLM, if it is there, sees the GPU.

python -m benchmarks.gpu_check.device
"""

import sys
from importlib.util import find_spec

import torch
import triton

from vase_vllm.kernels.launch import device_limits


def check_matmul(device: torch.device) -> None:
    """Multiply on the device, and compare with the host.

    Raises:
        SystemExit: the product is another.
    """
    left, right = torch.randn(2, 256, 256)
    product = (left.to(device) @ right.to(device)).cpu()
    if not torch.allclose(product, left @ right, atol=0.1):
        raise SystemExit("FAILED: the GPU's product of two matrices is not that of the CPU")


def check_vllm() -> None:
    """Import vLLM with the plugin.

    Raises:
        SystemExit: its platform is not CUDA, or it does not know the plugin's flag.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not current_platform.is_cuda():
        raise SystemExit(f"FAILED: vLLM's platform is {current_platform.device_type}, not cuda")
    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    if "--kv-eviction" not in parser.format_help():
        raise SystemExit(
            "FAILED: vLLM does not know --kv-eviction: pip install --no-deps . beside it"
        )


def main() -> int:
    """0, or an exception that says what is wrong."""
    device = torch.device("cuda")
    limits = device_limits(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    print(f"{limits.num_sms} SMs, {limits.shared_memory} bytes of shared memory for a program")
    check_matmul(device)
    if find_spec("vllm") is None:
        print("vLLM is not installed: the kernels alone can be checked")
    else:
        check_vllm()
    print("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
