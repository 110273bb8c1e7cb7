"""Files come from the Hub while others are converted, and go again with --stream: same bytes, whatever goes wrong.

The client is the real huggingface_hub; the Hub is tests/hub_server.py, with faults on purpose.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import factors, write_adapter
from checkpoints import tree
from click.testing import CliRunner
from hub_server import Fault, Hub
from watching import watched

import fp4conv
from fp4conv.cli import main
from fp4conv.commands.convert import plan_conversion
from fp4conv.commands.fetching import Fetching
from fp4conv.errors import OutputError, PlanError, SourceError, UsageError
from fp4conv.pipeline.settle import settle
from fp4conv.pipeline.supply import FOLDER
from fp4conv.sources import open_source
from fp4conv.staging import JOURNAL_NAME
from fp4conv.synthetic import write_checkpoint

Reference = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"to": "nvfp4", "modules": "all", "max_shard_size": "1MB"}
WORDS = ["--to", "nvfp4", "--modules", "all", "--max-shard-size", "1MB"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "src"
    write_checkpoint(folder, nbytes=20_000_000, family="gpt-oss", seed=4, max_shard_bytes=1_500_000)
    assert len(list(folder.glob("*.safetensors"))) > 8
    return folder


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    """The Hub, with `model` as owner/model."""
    hub.add("owner/model", model)
    return hub


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    fp4conv.convert(model, model.parent / "local", **OPTIONS)  # type: ignore[arg-type]
    return tree(model.parent / "local")


def convert(destination: Path, source: str = "owner/model", **options: object) -> fp4conv.ConvertResult:
    return fp4conv.convert(source, destination, **{**OPTIONS, **options})  # type: ignore[arg-type]


def downloads(hub: Hub, since: int = 0) -> Counter[str]:
    """How often each shard was begun with from its first byte."""
    lines = [request.line for request in hub.requests[since:] if not request.range]
    return Counter(found[1] for line in lines if (found := re.search(r"GET /cdn/.*path=([\w.-]+)", line)))


def least(source: str = "owner/model", **options: object) -> int:
    plan = plan_conversion(source, **(options or OPTIONS))
    return Fetching.of(settle(plan, repair=False, hints=True)).least


# ---- by way of the cache


def test_each_file_comes_once_and_the_bytes_are_those_of_a_local_run(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    commit = hub.add("owner/model", model)
    fetched: list[int] = []
    result = convert(tmp_path / "out", on_fetch=fetched.append)
    assert tree(tmp_path / "out") == expected
    assert result.commits == {"owner/model@main": commit}
    shards = {path.name: path.stat().st_size for path in model.glob("*.safetensors")}
    assert downloads(hub) == dict.fromkeys(shards, 1)
    assert sum(fetched) == sum(shards.values())
    before = len(hub.requests)
    convert(tmp_path / "again")
    assert not downloads(hub, before)  # the cache has them
    assert tree(tmp_path / "again") == expected


def test_files_that_are_here_are_converted_while_others_come(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.add("owner/model", model)
    last = max(path.name for path in model.glob("*.safetensors"))
    begun = threading.Event()
    plans: list[int] = []

    def on_plan(*_: object) -> None:
        hub.faults.append(Fault(f"GET /cdn/.*path={last}", until=begun))  # the download, after the header's range
        plans.append(len(hub.requests))

    convert(tmp_path / "out", on_plan=on_plan, on_bytes=lambda nbytes: begun.set() if nbytes else None)
    assert tree(tmp_path / "out") == expected
    assert begun.is_set()
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("GET /cdn", times=4, cut_after=700_000)],
        [Fault("HEAD .*safetensors", times=2, status=500), Fault("GET /cdn", times=2, status=503)],
        [Fault("GET /cdn", shorter=1000)],
        [Fault("GET /cdn", flip=1_200_000)],
        [Fault("HEAD .*safetensors", times=50, etag="0123456789abcdef")],
        [Fault("GET /cdn", times=3, pause=0.02)],
    ],
    ids=["cut", "500", "wrong-size", "flipped-bit", "other-etag", "slow"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_faults_on_the_way_change_no_byte(
    served: Hub, expected: dict[str, str], tmp_path: Path, faults: list[Fault], stream: bool
) -> None:
    own = [Fault(**vars(fault)) for fault in faults]
    convert(tmp_path / "out", stream=stream, on_plan=lambda *_: served.faults.extend(own))
    assert tree(tmp_path / "out") == expected
    assert any(fault.times < before.times for fault, before in zip(own, faults, strict=True))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Fault("GET /cdn/.*00005-of", times=99, flip=900_000), "SHA-256"),
        (Fault("GET /cdn/.*00005-of", times=99, shorter=10), "bytes, the Hub said"),
        (Fault("GET /cdn/.*00005-of", times=99, status=500), "answers 500"),
        (Fault("GET /cdn/.*00005-of", times=99, status=403), "answers 403"),
    ],
    ids=["flipped", "shorter", "500", "403"],
)
def test_a_fault_that_stays_is_named_and_the_same_command_goes_on(
    served: Hub, expected: dict[str, str], tmp_path: Path, fault: Fault, found: str
) -> None:
    own, stream = Fault(**vars(fault)), found in ("SHA-256", "answers 403")
    with pytest.raises(SourceError, match=found) as caught:
        convert(tmp_path / "out", stream=stream, on_plan=lambda *_: served.faults.append(own))
    assert "00005-of" in str(caught.value.where)
    assert "goes on from there" in str(caught.value)
    assert ("--stream" in str(caught.value)) == stream
    assert not (tmp_path / "out").exists()
    served.faults.clear()
    fetched: list[int] = []
    result = convert(tmp_path / "out", stream=stream, on_fetch=fetched.append)
    assert sum(fetched) == sum(file.nbytes for file in open_source("owner/model").files if file.weights)
    assert result.bytes_read > 0
    assert tree(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "hub-content", "hub-cache"}


def test_a_full_disk(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    hub.add("owner/model", model)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=22_000_000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match="disk is too small"):
            convert(tmp_path / "out")
    assert not downloads(hub)
    get = file_download.http_get
    calls: list[object] = []

    def full(*args: object, **options: object) -> None:
        calls.append(args)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        get(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(SourceError, match="the disk is full") as caught:
            convert(tmp_path / "out")
    assert "HF_HUB_CACHE" in str(caught.value)
    assert "--stream" in str(caught.value)
    before = len(hub.requests)
    convert(tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    assert 0 < sum(downloads(hub, before).values()) < len(list(model.glob("*.safetensors")))


def test_ctrl_c_leaves_no_thread_and_no_half_file(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("owner/model", model)

    def stop(nbytes: int) -> None:
        if nbytes:
            raise KeyboardInterrupt

    hub.faults.append(Fault("GET /cdn", times=-1, pause=0.01))
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - KeyboardInterrupt is no Exception
        convert(tmp_path / "out", on_bytes=stop)
    assert caught.type is KeyboardInterrupt
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fp4conv-fetch")]
    assert not list((tmp_path / "hub-cache").rglob("*.incomplete"))


# ---- commits


def test_an_interrupted_run_goes_on_from_the_commit_that_it_began_with(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    first = hub.add("owner/model", model)
    own = Fault("GET /cdn/.*00005-of", times=99, status=500)
    with pytest.raises(SourceError):
        convert(tmp_path / "out", on_plan=lambda *_: hub.faults.append(own))
    hub.faults.clear()
    second = hub.change("owner/model", {"generation_config.json": b"{}"})
    result = convert(tmp_path / "out")
    assert result.commits == {"owner/model@main": first}
    assert tree(tmp_path / "out") == expected
    assert hub.store.repos["owner/model"].refs["main"] == second
    assert convert(tmp_path / "new").commits == {"owner/model@main": second}


# ---- through a folder of its own


def test_streaming_keeps_to_its_bound_and_leaves_no_copy(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.add("owner/model", model)
    bound = least()
    source = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    result = sum((model.parent / "local" / name).stat().st_size for name in expected)
    assert result < bound < result + source / 2
    place = tmp_path / "place"
    place.mkdir()
    with watched(place) as peak:
        convert(place / "out", stream=True, max_disk=bound)
    assert source / 10 < peak[0] - result
    assert peak[0] <= bound
    assert tree(place / "out") == expected
    assert [path.name for path in place.iterdir()] == ["out"]
    assert set(downloads(hub).values()) == {1}
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


def test_the_bound_counts_what_comes_into_the_cache(
    served: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizer and configs, and an adapter, which may be large."""
    served.change("owner/model", {"tokenizer.json": b'{"a": "' + b"b" * 2_000_000 + b'"}'})
    name = "model.layers.0.self_attn.q_proj"
    weight = next(step.weight for step in plan_conversion(model, to="bf16").steps if step.key == f"{name}.weight")
    assert weight is not None
    write_adapter(tmp_path / "adapter", factors(f"model.{name}", weight.n, weight.k, rank=256), r=256)
    served.add("owner/adapter", tmp_path / "adapter")
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    bound = least(**OPTIONS, lora=["owner/adapter"])
    assert bound >= least() + adapter > 2_000_000 + adapter
    shutil.rmtree(tmp_path / "hub-cache")
    (tmp_path / "all").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "all" / "hub"))
    with watched(tmp_path / "all") as peak:
        convert(tmp_path / "all" / "dst", stream=True, max_disk=bound, lora=["owner/adapter"])
    assert peak[0] <= bound


def test_a_bound_that_is_too_small_is_refused_with_the_one_that_works(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.add("owner/model", model)
    words = ["convert", "owner/model", str(tmp_path / "out"), *WORDS, "--stream"]
    refused = CliRunner().invoke(main, [*words, "--max-disk", str(least() - 1)])
    assert refused.exit_code == 1
    assert not (tmp_path / "out.partial").exists()
    named = re.search(r"--max-disk ([\d.]+[MG]B)", refused.output.split("least that works")[1])
    assert named is not None
    done = CliRunner().invoke(main, [*words, "--max-disk", named[1]])
    assert done.exit_code == 0, done.output
    assert tree(tmp_path / "out") == expected
    with pytest.raises(PlanError, match="too little"):
        convert(tmp_path / "other", stream=True, max_disk="1MB")
    with pytest.raises(UsageError, match="--stream"):
        convert(tmp_path / "other", max_disk="1GB")
    with pytest.raises(UsageError, match="on the Hub"):
        convert(tmp_path / "other", str(model), stream=True)


def test_files_in_the_cache_are_read_from_there(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    hub.add("owner/model", model)
    convert(tmp_path / "first")
    before = len(hub.requests)
    convert(tmp_path / "out", stream=True, max_disk=least())
    assert tree(tmp_path / "out") == expected
    assert not downloads(hub, before)
    assert list((tmp_path / "hub-cache").rglob("*.safetensors"))


@pytest.mark.parametrize("stream", [True, False])
def test_killed_and_resumed_nothing_comes_twice_that_is_still_here(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path, stream: bool
) -> None:
    hub.add("owner/model", model)
    hub.faults.append(Fault("GET /cdn", times=-1, pause=0.005))
    place = tmp_path / "place"
    place.mkdir()
    bound = least()
    words = ["convert", "owner/model", str(place / "out"), *WORDS]
    words += ["--stream", "--max-disk", str(bound)] if stream else []
    environment = {**os.environ, **hub.environment(tmp_path / "hub-cache", "hf_owner")}
    command = [sys.executable, "-m", "fp4conv", *words]
    with watched(place) as peak:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        journal = place / "out.partial" / JOURNAL_NAME
        kept = place / "out.partial" / FOLDER if stream else tmp_path / "hub-cache"
        while process.poll() is None:
            begun = journal.is_file() and journal.read_text().count('"done"') >= 8
            if begun and any(kept.rglob("*.safetensors")):  # a stream within a small bound holds none at times
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        held = {path.name for path in kept.rglob("*.safetensors")}
        before = len(hub.requests)
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert tree(place / "out") == expected
    assert held
    again = set(downloads(hub, before))
    assert not again & held
    if stream:
        assert peak[0] <= bound
        assert again < {path.name for path in model.glob("*.safetensors")}
        assert [path.name for path in place.iterdir()] == ["out"]


def test_what_a_streamed_run_left_is_no_part_of_a_result(
    hub: Hub, model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The same command without --stream goes on as well."""
    hub.add("owner/model", model)
    own = Fault("GET /cdn/.*00005-of", times=99, status=500)
    with pytest.raises(SourceError):
        convert(tmp_path / "out", stream=True, on_plan=lambda *_: hub.faults.append(own))
    left = tmp_path / "out.partial" / FOLDER / "model-00001-of-00011.safetensors"
    left.write_bytes(b"as a kill would leave it")
    hub.faults.clear()
    convert(tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out" / FOLDER).exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-nvfp4-default", {"to": "bf16"}),
        ("llama-nvfp4-default", {"to": "nvfp4", "layout": "compressed-tensors"}),
        ("gptoss-mxfp4", {"to": "nvfp4"}),
        ("llama-qat-fakequant-nvfp4-default", {"to": "nvfp4"}),
        ("qwen3moe-bf16", {"to": "mxfp4"}),
        ("bf16-with-hints", {"to": "mxfp4"}),
    ],
)
def test_every_read_of_a_streamed_run_is_foreseen(
    hub: Hub, reference: Reference, tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    """No step reads from a file that the plan does not say it needs: that would be a request for a range."""
    folder = tmp_path / "src"
    if name == "bf16-with-hints":
        fp4conv.convert(reference("gptoss-mxfp4"), folder, to="bf16", max_shard_size="100kB")
    elif "qat" in name:
        shutil.copytree(reference(name), folder)
    else:
        same = name.partition("-")[2].partition("-")[0]
        fp4conv.convert(reference(name), folder, to=same, max_shard_size="100kB")
    hub.add("owner/model", folder)
    fp4conv.convert(folder, tmp_path / "local", **options)  # type: ignore[arg-type]
    plans: list[int] = []
    fp4conv.convert(
        "owner/model",
        tmp_path / "out",
        stream=True,
        max_disk=least(**options),
        on_plan=lambda *_: plans.append(len(hub.requests)),
        **options,  # type: ignore[arg-type]
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    ranges = [request.line for request in hub.requests[plans[0] :] if request.range]
    assert not [line for line in ranges if "fp4conv" not in line]  # hints are checked before they are used
