"""A repository on the Hub as a source: the same as its folder, for kilobytes, at one commit, with errors that help.

The client is the real huggingface_hub; the Hub is tests/hub_server.py.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import noise, tree, write_shard
from click.testing import CliRunner, Result
from hub_server import Fault, Hub

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import SourceError
from fp4conv.hub import client
from fp4conv.hub.names import HubName, parse_name
from fp4conv.sources import HubSource, LocalSource, open_source
from fp4conv.synthetic import write_checkpoint

Reference = Callable[[str], Path]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 30 MB in many shards: kilobytes are few against it."""
    folder = tmp_path_factory.mktemp("large") / "model"
    write_checkpoint(folder, nbytes=30_000_000, family="gpt-oss", max_shard_bytes=3_000_000)
    return folder


def cli(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


# ---- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openai/gpt-oss-20b", ("openai/gpt-oss-20b", "main", "")),
        ("openai/gpt-oss-20b@v1.0", ("openai/gpt-oss-20b", "v1.0", "")),
        ("org/name@refs/pr/7", ("org/name", "refs/pr/7", "")),
        ("hf://org/name", ("org/name", "main", "")),
        ("hf://models/org/name/", ("org/name", "main", "")),
        ("hf://org/name/original", ("org/name", "main", "original")),
        ("hf://org/name@v1/a/b", ("org/name", "v1", "a/b")),
        ("hf://org/name@refs/pr/7/original", ("org/name", "refs/pr/7", "original")),
        ("hf://org/name@my%2Fbranch/original", ("org/name", "my/branch", "original")),
    ],
)
def test_names_of_repositories(text: str, expected: tuple[str, str, str]) -> None:
    assert parse_name(text) == HubName(text, *expected)


@pytest.mark.parametrize("text", ["name", "./org/name", "../name", "/org/name", "a/b/c", "a/b/", "a b/c", "-o/n", ""])
def test_paths_are_not_taken_for_repositories(text: str) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize("text", ["hf://name", "hf://", "hf://datasets/org/name", "hf://org/name/../x", "hf://o/n@"])
def test_malformed_names_are_refused(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(text)
    assert caught.value.where == text
    assert "hf://org/name" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["org/name@../../x", "org/name@/etc/x", "hf://org/name@..%2F..%2Fx", "org/name@a//b"])
def test_a_revision_that_leads_elsewhere_is_refused(text: str) -> None:
    """What the cache notes of a revision lies in a file that is called after it."""
    with pytest.raises(SourceError, match="is no revision"):
        parse_name(text)


@pytest.mark.parametrize(
    "name",
    [
        "/vocab.json",
        "../vocab.json",
        "a/../../vocab.json",
        "fp4conv//etc/x.json",
        "a\0b.json",
        "a\nb.json",
        "..\\x.json",
    ],
)
def test_a_list_of_files_that_leads_out_of_the_repository_is_refused(
    hub: Hub, reference: Reference, tmp_path: Path, name: str
) -> None:
    """Before anything is read or made: such a name would be looked for on this machine, and published."""
    folder = reference("llama-bf16")
    hub.add("owner/model", {path.name: path.read_bytes() for path in folder.iterdir()} | {name: b"{}"})
    with pytest.raises(SourceError, match="is no name for a file inside a repository"):
        fp4conv.convert("owner/model", tmp_path / "dst", to="mxfp4")
    assert not list(tmp_path.glob("dst*"))


def test_a_commit_that_is_none_is_refused(hub: Hub, reference: Reference) -> None:
    """It names a folder of the cache."""
    hub.add("owner/model", reference("llama-bf16"))
    repo = hub.store.repos["owner/model"]
    repo.commits["../../x"] = replace(repo.commits[repo.refs["main"]], sha="../../x")
    repo.refs["main"] = "../../x"
    with pytest.raises(SourceError, match=r"calls its commit '\.\./\.\./x'"):
        open_source("owner/model")


# ---- the same as the folder


@pytest.mark.parametrize("name", ["gptoss-mxfp4", "llama-bf16", "llama-nvfp4-default"])
def test_a_repository_is_the_folder_that_it_holds(hub: Hub, reference: Reference, name: str) -> None:
    folder = reference(name)
    commit = hub.add("owner/model", folder)
    source, local = open_source("owner/model"), LocalSource(folder)
    assert isinstance(source, HubSource)
    assert source.tensors == dict(local.tensors)
    assert [(file.name, file.nbytes, file.weights) for file in source.files] == [
        (file.name, file.nbytes, file.weights) for file in local.files
    ]
    assert source.json("config.json") == local.json("config.json")
    assert source.json("absent.json") is None
    assert source.warnings == local.warnings
    assert source.pinned.commit == commit
    assert source.pinned.asked == "owner/model@main"


def test_values_are_read_by_ranges(hub: Hub, reference: Reference) -> None:
    folder = reference("llama-nvfp4-default")
    hub.add("owner/model", folder)
    with fp4conv.open("owner/model") as ours, fp4conv.open(folder) as local:
        assert ours.names == local.names
        for name in ours.names:
            np.testing.assert_array_equal(ours.read(name).view(np.uint8), local.read(name).view(np.uint8))
            rows = slice(1, 3) if len(local.read(name).shape) == 2 else None
            np.testing.assert_array_equal(ours.read(name, rows).view(np.uint8), local.read(name, rows).view(np.uint8))
    assert not list(client.cache_folder("owner/model").glob("snapshots/*/*.safetensors"))


def test_a_few_rows_of_a_large_tensor_cost_a_few_blocks(hub: Hub, large: Path) -> None:
    hub.add("owner/model", large)
    with fp4conv.open("owner/model") as ours, fp4conv.open(large) as local:
        before = hub.sent()
        name = max(local.names, key=lambda each: local.read(each).nbytes)
        assert local.read(name).nbytes > 2_000_000
        rows = slice(0, 1) if len(local.read(name).shape) == 2 else None
        np.testing.assert_array_equal(ours.read(name, rows).view(np.uint8), local.read(name, rows).view(np.uint8))
        if rows:
            assert hub.sent() - before < 600_000


def test_strided_rows_come_in_one_request(hub: Hub, large: Path) -> None:
    """As the bands of a K-major matrix are read."""
    hub.add("owner/model", large)
    source = open_source("owner/model")
    ref = max(source.tensors.values(), key=lambda each: each.spec.nbytes)
    got, expected = bytearray(60 * 7), bytearray(60 * 7)
    span = {"row_bytes": 60, "row_stride": 2880, "rows": 7}
    with source.reader() as reader, LocalSource(large).reader() as local:
        before = hub.count("GET /cdn")
        reader.read_strided(ref.file, ref.offset + 100, got, **span)
        local.read_strided(ref.file, ref.offset + 100, expected, **span)
        assert hub.count("GET /cdn") == before + 1
    assert got == expected


# ---- kilobytes


def test_headers_plan_and_dry_run_cost_kilobytes(hub: Hub, large: Path, tmp_path: Path) -> None:
    commit = hub.add("owner/model", large)
    inspected = cli("inspect", "owner/model", "--headers-only", "--json")
    assert inspected.exit_code == 0, inspected.output
    facts = json.loads(inspected.stdout)
    assert facts["tensors"] == json.loads(cli("inspect", str(large), "--headers-only", "--json").stdout)["tensors"]
    weights = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    shards = len(list(large.glob("*.safetensors")))
    assert shards >= 8
    assert hub.sent() < shards * 2**16 + 100_000 < weights / 20
    before = hub.sent()
    planned = cli("convert", "owner/model", str(tmp_path / "out"), "--to", "nvfp4", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert hub.sent() - before < shards * 2**16 + 100_000
    plan = json.loads(planned.stdout)
    assert plan["commits"] == {"owner/model@main": commit}
    assert plan["download"]["download_bytes"] == weights
    assert plan["download"]["cached_bytes"] == 0
    assert 3_000_000 < plan["download"]["least_max_disk_bytes"] < plan["disk_needed_bytes"]
    assert plan["disk_needed_bytes"] > weights
    shown = cli("convert", "owner/model", str(tmp_path / "out"), "--to", "nvfp4", "--dry-run").output
    assert commit in shown
    assert re.search(r"stream +with --stream, --max-disk [\d.]+MB is enough", shown)


def test_only_what_is_needed_comes_down(hub: Hub, reference: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reference("gptoss-mxfp4"), folder)
    for name in ("original/model.safetensors", "original/config.json", "metal/model.bin", "pytorch_model.bin",
                 "model-Q4.gguf", "modeling_x.py", "training_args.bin", "runs/events", ".hidden"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be read")
    hub.add("owner/model", folder)
    result = fp4conv.convert("owner/model", tmp_path / "out", to="bf16", hints=False)
    asked = " ".join(request.line for request in hub.requests if "/api/" not in request.line)
    for word in ("original", "metal", ".bin", "gguf", ".py", "runs", "hidden"):
        assert word not in asked
    local = fp4conv.convert(folder, tmp_path / "local", to="bf16", hints=False)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    assert result.warnings == local.warnings


def test_a_folder_of_a_repository(hub: Hub, reference: Reference, tmp_path: Path) -> None:
    original = tmp_path / "repository" / "original"
    fp4conv.convert(reference("gptoss-mxfp4"), original, to="mxfp4", layout="openai-original", hints=False)
    (tmp_path / "repository" / "README.md").write_text("hello")
    hub.add("owner/model", tmp_path / "repository")
    with pytest.raises(SourceError, match="hf://owner/model/original"):
        open_source("owner/model")
    assert fp4conv.inspect("hf://owner/model/original", headers_only=True).layout == "openai-original"
    ours = fp4conv.convert("hf://owner/model/original", tmp_path / "ours", to="bf16", hints=False)
    fp4conv.convert(original, tmp_path / "local", to="bf16", hints=False)
    assert tree(tmp_path / "ours") == tree(tmp_path / "local")
    assert ours.commits
    with pytest.raises(SourceError, match=r"no folder 'metal'.*\n.*original"):
        open_source("hf://owner/model/metal")


def test_inspect_and_verify_read_values_from_the_cache(hub: Hub, reference: Reference) -> None:
    hub.add("owner/model", reference("llama-nvfp4-default"))
    hub.add("owner/dense", reference("llama-bf16"))
    found = fp4conv.inspect("owner/model", reference="owner/dense")
    assert found.to_json()["tensors"] == fp4conv.inspect(
        reference("llama-nvfp4-default"), reference=reference("llama-bf16")
    ).to_json()["tensors"]  # fmt: skip
    before = len(hub.requests)
    checked = fp4conv.verify("owner/model").to_json()
    local = fp4conv.verify(reference("llama-nvfp4-default")).to_json()
    for said in (checked, local):  # remedies spell the command with the source's name
        said["source"], said["problems"] = "", [{**problem, "remedy": ""} for problem in said["problems"]]  # type: ignore[union-attr,dict-item]
    assert checked == local
    assert not [request for request in hub.requests[before:] if "safetensors" in request.line]


def test_what_comes_to_be_read_is_told_and_can_be_stopped(hub: Hub, large: Path, tmp_path: Path) -> None:
    hub.add("owner/model", large)
    hub.faults.append(Fault("GET /cdn", times=-1, pause=0.002))

    def stop(nbytes: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - KeyboardInterrupt is no Exception
        fp4conv.verify("owner/model", on_fetch=stop)
    assert caught.type is KeyboardInterrupt
    assert not list((tmp_path / "hub-cache").rglob("*.incomplete"))
    told: list[tuple[int, int]] = []
    fp4conv.verify("owner/model", on_fetch=lambda nbytes, total: told.append((nbytes, total)))
    assert sum(nbytes for nbytes, _ in told) == told[0][1]
    assert sum(path.stat().st_size for path in large.glob("*.safetensors")) <= told[0][1]


def test_headers_of_many_shards_are_asked_for_together(hub: Hub, tmp_path: Path) -> None:
    """A shard's answer waits until others are asked for: one after the other would never get there."""
    count = 40
    for number in range(1, count + 1):
        tensors = {f"model.layers.{number}.mlp.up_proj.weight": noise((32, 64), number)}
        write_shard(tmp_path / f"model-{number:05d}-of-{count:05d}.safetensors", tensors)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    hub.add("owner/model", {**files, "config.json": b'{"model_type": "llama"}'})
    together = threading.Event()
    hub.faults.append(Fault("GET /cdn/.*00001-of", until=together))

    def watch() -> None:
        while hub.count("GET /cdn") < 6:
            time.sleep(0.005)
        together.set()

    threading.Thread(target=watch, daemon=True).start()
    assert len(open_source("owner/model").tensors) == count


# ---- commits


def test_a_revision_is_taken_and_the_commit_recorded(hub: Hub, reference: Reference, tmp_path: Path) -> None:
    first = hub.add("owner/model", reference("llama-bf16"))
    second = hub.change("owner/model", {"generation_config.json": b"{}"})
    for text, commit in (
        ("owner/model", second),
        (f"owner/model@{first}", first),
        (f"hf://owner/model@{first}", first),
    ):
        source = open_source(text)
        assert source.pinned is not None
        assert source.pinned.commit == commit
        assert (source.read_bytes("generation_config.json") == b"{}") == (commit == second)
    done = cli("convert", f"owner/model@{first}", str(tmp_path / "out"), "--to", "nvfp4", "--json")
    assert json.loads(done.stdout)["commits"] == {f"owner/model@{first}": first}


def test_a_pull_request_is_a_revision(hub: Hub, reference: Reference) -> None:
    hub.add("owner/model", {"README.md": b"nothing yet"})
    repo = hub.store.repos["owner/model"]
    pull = hub.store.open_pull(repo, "weights")
    files = {path.name: path.read_bytes() for path in reference("llama-bf16").iterdir()}
    commit = hub.change("owner/model", files, ref=pull.ref)
    for text in ("owner/model@refs/pr/1", "hf://owner/model@refs/pr/1"):
        source = open_source(text)
        assert source.pinned is not None
        assert (source.pinned.commit, source.pinned.asked) == (commit, "owner/model@refs/pr/1")
        assert len(source.tensors) == len(LocalSource(reference("llama-bf16")).tensors)
    assert "there are no safetensors files" in refusal("owner/model")


def test_adapters_and_bases_from_the_hub(hub: Hub, reference: Reference, tmp_path: Path) -> None:
    base = reference("qwen3moe-bf16")
    adapter = next(reference("lora-variants").glob("qwen3moe-experts/*/adapter_config.json")).parent
    hub.add("owner/base", base)
    hub.add("owner/adapter", adapter)
    fp4conv.merge_lora(base, adapter, tmp_path / "local")
    fp4conv.merge_lora("owner/base", "owner/adapter", tmp_path / "both")
    fp4conv.merge_lora(base, "owner/adapter", tmp_path / "adapter")
    fp4conv.merge_lora("owner/base", adapter, tmp_path / "base")
    for name in ("both", "adapter", "base"):
        assert tree(tmp_path / name) == tree(tmp_path / "local")
    with pytest.raises(SourceError, match=r"has no adapter_model\.safetensors"):
        fp4conv.merge_lora("owner/base", "owner/base", tmp_path / "none")


# ---- refusals


def refusal(text: str) -> str:
    done = cli("inspect", text, "--headers-only")
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {text}")
    return done.output


def test_what_the_hub_refuses_is_said_with_what_to_do(
    hub: Hub, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reference("llama-bf16")
    hub.add("owner/private", folder, private=True)
    hub.add("owner/gated", folder, gated=True)
    assert fp4conv.inspect("owner/private", headers_only=True).family == "dense"  # the owner's token, from HF_TOKEN
    assert "no such repository" in (found := refusal("owner/absent"))
    assert "hf auth login" in found
    assert "no such revision" in (found := refusal("owner/private@v9"))
    assert f"{hub.endpoint}/owner/private/tree/main" in found
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "no such repository" in refusal("owner/private")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "gated" in (found := refusal("owner/gated"))
    assert f"{hub.endpoint}/owner/gated" in found
    assert "hf auth login" in found
    monkeypatch.setenv("HF_TOKEN", "hf_reader")  # a login without access: 403 instead of 401
    assert "gated" in refusal("owner/gated")
    hub.store.repos["owner/gated"].readers.add("reader")
    assert fp4conv.inspect("owner/gated", headers_only=True).family == "dense"
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "401" in (found := refusal("owner/private"))
    assert "token is not valid" in found


def test_a_login_is_used(hub: Hub, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/private", reference("llama-bf16"), private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert "no such repository" in refusal("owner/private")
    (tmp_path / "hub-cache").mkdir(exist_ok=True)
    (tmp_path / "hub-cache" / "token").write_text("hf_owner")  # what `hf auth login` leaves
    assert fp4conv.inspect("owner/private", headers_only=True).family == "dense"


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = refusal("owner/model")
    assert "cannot be reached" in found
    assert "HF_ENDPOINT" in found
    assert "HF_HUB_OFFLINE=1" in found


def test_an_outage_in_the_middle_is_waited_for_and_one_at_the_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import get_session

    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0))
    asked: list[int] = []

    def ask() -> str:
        asked.append(0)
        if len(asked) % 3:
            get_session().get("http://127.0.0.1:9")
        return "here"

    assert client.patiently(ask) == "here"
    assert len(asked) == 3
    with pytest.raises(Exception, match="refused"):
        client.patiently(ask, first=True)
    assert len(asked) == 4


def test_offline_means_the_cache_and_nothing_else(
    hub: Hub, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = hub.add("owner/model", reference("llama-bf16"))
    fp4conv.convert("owner/model", tmp_path / "online", to="nvfp4")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    for text in ("owner/model", f"owner/model@{commit}"):
        offline = fp4conv.convert(text, tmp_path / "offline", to="nvfp4", overwrite=True)
        assert list(offline.commits.values()) == [commit]
        assert tree(tmp_path / "online") == tree(tmp_path / "offline")
    assert "HF_HUB_OFFLINE is set" in refusal("owner/other")
    next(client.cache_folder("owner/model").glob("snapshots/*/model-00002*")).unlink()
    found = cli("inspect", "owner/model", "--headers-only").output
    assert "1 are missing" in found
    assert "unset it" in found
    assert len(hub.requests) == before


def test_a_hiccup_is_outlived_and_a_fault_is_named(hub: Hub, reference: Reference) -> None:
    hub.add("owner/model", reference("llama-bf16"))
    hub.faults += [Fault("GET /api/models", status=503), Fault("GET /owner/model/resolve", status=500)]
    hub.faults += [Fault("GET /cdn", cut_after=100)]
    assert fp4conv.inspect("owner/model", headers_only=True).family == "dense"
    hub.faults.append(Fault("GET /api/models", times=9, status=503))
    assert "the Hub answers 503" in refusal("owner/model")
    hub.faults[:] = [Fault("GET /cdn", times=9, shorter=8)]
    done = cli("inspect", "owner/model", "--headers-only")
    assert done.exit_code == 1
    assert "its list of files says" in done.output
    hub.faults[:] = [Fault("GET /api/models", times=9, status=429)]
    assert "Too many requests" in refusal("owner/model")


def test_a_header_that_is_damaged_on_its_way_is_refused(hub: Hub, reference: Reference) -> None:
    hub.add("owner/model", reference("gptoss-mxfp4"))
    hub.faults.append(Fault("GET /cdn", flip=3))
    done = cli("inspect", "owner/model", "--headers-only")
    assert done.exit_code == 1
    assert "model.safetensors" in done.output
