"""The status page as a plugin of vLLM's API server (group ``vllm.endpoint_plugins``).

vLLM loads such plugins only where ``VLLM_PLUGINS`` names them. Nothing here shows a prompt or an
output, and nothing here changes anything.
"""

from argparse import Namespace
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from vase_vllm.config import EvictionConfig
from vase_vllm.status.snapshot import snapshot

PATH = "/kv_eviction"
router = APIRouter(prefix=PATH, tags=["KV eviction"])


class StatusPage:
    """What vLLM wants of an endpoint plugin; see its ``EndpointPlugin``."""

    name = "vase-status"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Nothing to prepare: the routes find vLLM's own state."""


@router.get("", response_class=HTMLResponse)
async def page() -> str:
    """One page that draws the status while it is open."""
    return _page()


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """The settings, and the metrics of all engines as one."""
    config = _config(request)
    if not request.app.state.log_stats:
        raise HTTPException(503, "there are no metrics: remove --disable-log-stats")
    return {"policy": config.policy.name, "settings": str(config), **snapshot()}


@router.get("/requests")
async def requests(request: Request) -> list[dict[str, Any]]:
    """The requests of the latest step, of the first engine if there are several.

    Each has ``request_id``, ``logical_tokens`` that it has computed, ``held_tokens`` of them that
    every layer and KV head holds, ``evictions`` and ``evicted_tokens`` so far, and its ``budget``.
    """
    _config(request)
    workers = await request.app.state.engine_client.collective_rpc("get_kv_eviction_requests")
    # All workers hold the same of a request, each for its own layers and heads.
    found: list[dict[str, Any]] = workers[0]
    return found


def _config(request: Request) -> EvictionConfig:
    """The server's settings; HTTP 404 where it does not evict."""
    config = EvictionConfig.from_vllm(request.app.state.vllm_config)
    if config is None:
        raise HTTPException(404, "this server does not evict: start it with --kv-eviction")
    return config


@cache
def _page() -> str:
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")
