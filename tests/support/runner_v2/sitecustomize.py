"""Runs vLLM's model runner V2 on a CPU, whole, under Triton's interpreter.

On PYTHONPATH this reaches every process of an engine. vLLM turns Triton, and with it runner V2, on
only if some Triton backend has an active driver; the interpreter needs none, so a stand-in serves.
Needs TRITON_INTERPRET=1 and VLLM_USE_V2_MODEL_RUNNER=1 in the environment.
"""

import types

import triton.backends

triton.backends.backends["cpu"] = types.SimpleNamespace(
    driver=types.SimpleNamespace(is_active=lambda: True)
)
