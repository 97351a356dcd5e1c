"""What stands in for a GPU where vLLM's own attention code runs without one.

Everything of vLLM runs: its metadata builders and the implementations that call the kernels. In the
GPU's place are the capability that it reports, and the attention kernels, which record what they
are handed. FlashInfer is not installed, so the names that vLLM imports of it are stand-ins as well.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """An attention backend on a GPU.

    Attributes:
        module: of the backend, under ``vllm.v1.attention.backends``.
        backend: name of its class.
        capability: of the GPU; it decides which kernels the backend calls.
        layout: of the KV cache, in vLLM's letters.
        flash_attention: version of FlashAttention that vLLM chooses there.
    """

    module: str
    backend: str
    capability: tuple[int, int]
    layout: str = "LBNHC"
    flash_attention: int | None = None


TARGETS = {
    "flash-attention 2": Target("flash_attn", "FlashAttentionBackend", (8, 0), flash_attention=2),
    "flash-attention 3": Target("flash_attn", "FlashAttentionBackend", (9, 0), flash_attention=3),
    "flashinfer native": Target("flashinfer", "FlashInferBackend", (8, 0)),
    "flashinfer xqa": Target("flashinfer", "FlashInferBackend", (9, 0)),
    "flashinfer trtllm-gen": Target("flashinfer", "FlashInferBackend", (10, 0), layout="LBHNC"),
    "triton": Target("triton_attn", "TritonAttentionBackend", (9, 0)),
}


@dataclass(frozen=True)
class Tables:
    """A kernel call that gets a block table and lengths on the device.

    Attributes:
        block_table: [R, columns] int32.
        seq_lens: [R] int32.
        max_seq_len: a number of the host, which a CUDA graph keeps from its capture.
        scheduler_metadata: of FlashAttention 3.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    scheduler_metadata: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.block_table, self.seq_lens

    def sequences(self, block_size: int) -> list[tuple[list[int], int]]:
        """Blocks and length of each row, as the kernel would read them now."""
        lengths = self.seq_lens.tolist()
        return [
            (row[: -(-length // block_size)].tolist(), length)
            for row, length in zip(self.block_table, lengths, strict=True)
        ]


@dataclass(frozen=True)
class Pages:
    """A kernel call that gets one list of all rows' pages, planned on the host.

    Attributes:
        indptr: [R + 1] int32, where each row's pages begin.
        indices: [pages or more] int32.
        last_page_len: [R] int32, tokens of each row's last page.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.indptr, self.indices, self.last_page_len

    def sequences(self, block_size: int) -> list[tuple[list[int], int]]:
        """Blocks and length of each row, as the kernel would read them now."""
        rows = []
        begins, last = self.indptr.tolist(), self.last_page_len.tolist()
        for begin, end, tokens in zip(begins[:-1], begins[1:], last, strict=True):
            blocks = self.indices[begin:end].tolist()
            rows.append((blocks, max(len(blocks) - 1, 0) * block_size + tokens))
        return rows


class Kernels:
    """Records the calls of attention kernels."""

    def __init__(self) -> None:
        self.calls: list[Tables | Pages] = []

    def table(self, block_table: str, seq_lens: str, max_seq_len: str) -> Callable[..., None]:
        """A kernel that takes a block table; the names are those of its arguments."""

        def kernel(**arguments: Any) -> None:
            self.calls.append(
                Tables(
                    arguments[block_table],
                    arguments[seq_lens],
                    arguments[max_seq_len],
                    arguments.get("scheduler_metadata"),
                )
            )

        return kernel


def use(target: Target, monkeypatch: Any) -> tuple[Any, Kernels]:
    """Let vLLM believe in the target's GPU for one test.

    Returns:
        The backend's class, and what records the calls of its kernels.
    """
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    capability = classmethod(lambda cls, device_id=0: DeviceCapability(*target.capability))
    monkeypatch.setattr(type(current_platform), "get_device_capability", capability)
    if target.module == "flashinfer":
        _import_flashinfer_backend()
    module = importlib.import_module(f"vllm.v1.attention.backends.{target.module}")
    kernels = Kernels()
    {"flash_attn": _flash_attention, "flashinfer": _flashinfer, "triton_attn": _triton}[
        target.module
    ](target, module, kernels, monkeypatch)
    return getattr(module, target.backend), kernels


def _triton(target: Target, module: Any, kernels: Kernels, monkeypatch: Any) -> None:
    kernel = kernels.table("block_table", "seqused_k", "max_seqlen_k")
    monkeypatch.setattr(module, "unified_attention", kernel)


def scheduler_metadata(*, batch_size: int, cache_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
    """What FlashAttention 3 plans ahead: here the lengths that it is told, in its own size."""
    size = 1 + -(-batch_size // 4) * 4 * 4
    metadata = torch.zeros(size, dtype=torch.int32)
    metadata[1 : 1 + batch_size] = cache_seqlens
    return metadata


def _flash_attention(target: Target, module: Any, kernels: Kernels, monkeypatch: Any) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    version = target.flash_attention
    monkeypatch.setattr(module, "get_flash_attn_version", lambda *_, **__: version)
    # vLLM asks for the version where the class is defined, which was without this GPU.
    support = AttentionCGSupport.ALWAYS if version == 3 else AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setattr(module.FlashAttentionMetadataBuilder, "_cudagraph_support", support)
    # Names that vLLM imports only where FlashAttention is.
    monkeypatch.setattr(module, "get_scheduler_metadata", scheduler_metadata, raising=False)
    kernel = kernels.table("block_table", "seqused_k", "max_seqlen_k")
    monkeypatch.setattr(module, "flash_attn_varlen_func", kernel, raising=False)


def _flashinfer(target: Target, module: Any, kernels: Kernels, monkeypatch: Any) -> None:
    from vllm.utils import flashinfer as utilities

    # Whether the kernels could be downloaded.
    monkeypatch.setattr(utilities, "has_nvidia_artifactory", lambda: True)
    utilities.supports_trtllm_attention.cache_clear()
    monkeypatch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
    monkeypatch.setattr(module, "trtllm_workspace_buffer", torch.zeros(16, dtype=torch.uint8))
    decode = kernels.table("block_tables", "seq_lens", "max_seq_len")
    prefill = kernels.table("block_tables", "seq_lens", "max_kv_len")
    monkeypatch.setattr(module, "flashinfer_xqa_batch_decode_with_kv_cache", decode)
    monkeypatch.setattr(module, "trtllm_batch_decode_with_kv_cache", decode)
    monkeypatch.setattr(module, "trtllm_batch_context_with_kv_cache", prefill)
    monkeypatch.setattr(PagedWrapper, "kernels", kernels)


class PagedWrapper:
    """FlashInfer's wrappers: ``plan`` on the host before a step, ``run`` in every layer.

    For a CUDA graph a wrapper has buffers. A plan copies to them, but for the indices: from the
    second plan on FlashInfer expects these in its buffer already, where vLLM writes them.
    """

    kernels = Kernels()

    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        **_: Any,
    ) -> None:
        assert layout in ("NHD", "HND")
        self.is_cuda_graph_enabled = use_cuda_graph
        self.pages: Pages | None = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self.pages = Pages(
                paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            )

    def plan(self, **arguments: Any) -> None:
        prefix = "" if "indptr" in arguments else "paged_kv_"
        planned = Pages(
            *(arguments[prefix + name] for name in ("indptr", "indices", "last_page_len"))
        )
        for tensor in planned.tensors:
            assert tensor.dtype == torch.int32
        if self.pages is None or not self.is_cuda_graph_enabled:
            self.pages = Pages(*(tensor.clone() for tensor in planned.tensors))
        else:
            self.pages.indptr.copy_(planned.indptr)
            self.pages.last_page_len.copy_(planned.last_page_len)
            # vLLM wrote them where the kernel reads them.
            assert planned.indices.data_ptr() == self.pages.indices.data_ptr()
        self._window_left = arguments["window_left"]
        self._logits_soft_cap = arguments["logits_soft_cap"] or 0.0
        self._sm_scale = arguments["sm_scale"]
        self._causal = arguments.get("causal", True)

    def run(self, *_: Any, **__: Any) -> None:
        assert self.pages is not None
        self.kernels.calls.append(self.pages)


class PagedDecode(PagedWrapper):
    """Of ``flashinfer.BatchDecodeWithPagedKVCacheWrapper``."""


class PagedPrefill(PagedWrapper):
    """Of ``flashinfer.BatchPrefillWithPagedKVCacheWrapper``."""


def _get_seq_lens(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int):
    return (indptr[1:] - indptr[:-1] - 1).clamp(min=0) * page_size + last_page_len


def _import_flashinfer_backend() -> None:
    """Import vLLM's FlashInfer backend, with the names that it takes of FlashInfer."""
    name = "vllm.v1.attention.backends.flashinfer"
    if name in sys.modules:
        return
    missing = type("NotUsed", (), {})
    contents = {
        "flashinfer": dict(
            BatchAttentionWithAttentionSinkWrapper=missing,
            BatchDecodeWithPagedKVCacheWrapper=PagedDecode,
            BatchPrefillWithPagedKVCacheWrapper=PagedPrefill,
            BatchPrefillWithRaggedKVCacheWrapper=missing,
            get_seq_lens=_get_seq_lens,
            nvfp4_quantize_append_paged_kv_cache_with_slot_mapping=None,
        ),
        "flashinfer.decode": dict(
            fast_decode_plan=lambda wrapper, **arguments: wrapper.plan(**arguments),
            trtllm_batch_decode_with_kv_cache=None,
        ),
        "flashinfer.prefill": dict(trtllm_batch_context_with_kv_cache=None),
        "flashinfer.utils": dict(FP4Tensor=missing),
    }
    # Only while vLLM imports them: nobody else shall believe that FlashInfer is here.
    for module_name, names in contents.items():
        module = types.ModuleType(module_name)
        vars(module).update(names)
        sys.modules[module_name] = module
    try:
        importlib.import_module(name)
    finally:
        for module_name in contents:
            del sys.modules[module_name]
