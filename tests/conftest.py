"""Where the tests find checkpoints that other people's tools wrote.

`fixtures/` holds cut-down copies of the reference checkpoints. When FP4CONV_REFERENCE names the folder of the whole
ones, the same tests run on those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve, turn_client

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
REFERENCE_VARIABLE = "FP4CONV_REFERENCE"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Path]:
    """`reference(name)`: the folder of a reference checkpoint, whole where it is to be had, else its cut-down copy.

    A checkpoint that fixtures/ does not hold skips the test by name.
    """
    root = _full_root()

    def find(name: str) -> Path:
        if root is None and not (FIXTURES / name).is_dir():
            pytest.skip(f"fixtures/ does not hold {name}; {REFERENCE_VARIABLE} would name the folder that does")
        return _existing(FIXTURES if root is None else root, name)

    return find


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback, with this process's client turned to it and logged in as its owner; the cache is empty."""
    with serve(tmp_path / "hub-content") as hub:
        turn_client(monkeypatch, hub, tmp_path / "hub-cache", "hf_owner")
        yield hub


@pytest.fixture
def data_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """`hub`, to which the datasets library is turned too; its cache is empty."""
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    return hub


@pytest.fixture(scope="session")
def full_reference() -> Callable[[str], Path]:
    """`full_reference(name)`: the whole reference checkpoint; skips the test by name where it is not to be had."""
    root = _full_root()

    def find(name: str) -> Path:
        if root is None:
            pytest.skip(f"needs the whole {name}; set {REFERENCE_VARIABLE} to the folder of reference checkpoints")
        return _existing(root, name)

    return find


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt runs here, with fp4conv's arithmetic for its CUDA kernel."""
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt_cpu import put_kernel

    put_kernel(monkeypatch.setattr)


def _full_root() -> Path | None:
    text = os.environ.get(REFERENCE_VARIABLE)
    if not text:
        return None
    root = Path(text).resolve()
    if not root.is_dir():
        pytest.fail(f"{REFERENCE_VARIABLE}={text} is not a folder")
    return root


def _existing(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        pytest.fail(f"{root} holds no {name}")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: models of tests are so small that threads cost more than they bring."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
