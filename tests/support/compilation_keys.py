"""Under which key Triton would compile the kernel of a launch for a GPU, computed without one."""

from collections.abc import Iterable
from typing import Any

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

from vase_vllm.kernels.launch import Launch

TARGET = GPUTarget("cuda", 90, 32)


class CompilationKeys:
    """Computes the keys of launches, whether their kernels run under the interpreter or not.

    Args:
        specialise_all: as if no kernel were declared with ``do_not_specialize``.
    """

    def __init__(self, specialise_all: bool = False) -> None:
        self._specialise_all = specialise_all
        self._binders: dict[str, Any] = {}

    def __call__(self, launch: Launch) -> tuple[str, str]:
        """The kernel's name, and all that Triton compiles it for."""
        name = launch.kernel.__name__
        if name not in self._binders:
            self._binders[name] = self._binder(launch.kernel)
        _, specialization, options = self._binders[name](**launch.arguments)
        return name, f"{specialization} {options}"

    def of(self, launches: Iterable[Launch]) -> set[tuple[str, str]]:
        """The keys of several launches."""
        return {self(launch) for launch in launches}

    def _binder(self, kernel: Any) -> Any:
        """Triton's own function from arguments to what it specialises on."""
        # The interpreter's functions keep what their decorator was told.
        declared = kernel.__dict__ if isinstance(kernel, JITFunction) else kernel.kwargs
        names = [] if self._specialise_all else declared["do_not_specialize"]
        function = JITFunction(kernel.fn, do_not_specialize=names)
        backend = backends["nvidia"].compiler(TARGET)
        return create_function_from_signature(function.signature, function.params, backend)
