"""Environment variables of servers and engines; this module imports neither torch nor vLLM."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""One thread that no core is bound to: several engines on one machine then stay apart."""
KEEP_ALIVE = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""Seconds for which a server keeps an idle connection; one that it closes under its client ends
lm-evaluation-harness, and fails requests of vllm bench serve on a machine that stalls."""
QUIET = {**ONE_THREAD, "VLLM_LOGGING_LEVEL": "ERROR"}
"""One thread, and no log beside a progress bar."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine runs in the process that makes it, where it can be stepped by hand."""
