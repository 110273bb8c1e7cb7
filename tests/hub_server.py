"""A small Hub on loopback for the real huggingface_hub client: read, range, upload, pull request, merge, and faults.

`hub_store` is what it keeps, `hub_http` how it answers, `hub_state` what tests see and set. Clients run with
HF_HUB_DISABLE_XET=1, see `Hub.environment`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_http import PART_BYTES, PIECE_BYTES, Handler, Server
from hub_state import Fault, Hub, Request
from hub_store import Store

from fp4conv.hub import client

__all__ = ["PART_BYTES", "Fault", "Hub", "Request", "serve", "turn_client"]


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A running Hub whose content lies in `folder`; stopped at the end."""
    servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
    endpoint, cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    hub = Hub(Store(folder), endpoint, cdn)
    threads = []
    for server in servers:
        server.hub = hub
        threads.append(threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True))
        threads[-1].start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


def turn_client(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path, token: str = "") -> None:
    """Turn the client of this process, which has read its environment already, to `hub`, which is worth no waiting."""
    from huggingface_hub import constants

    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0))
    for name, value in hub.environment(cache, token).items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # Files of tests are small: with the client's 10 MB a cut download would always begin again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE_BYTES)
    for name, flag in {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, flag)
