"""Publishing with the real huggingface_hub client: one pull request, whole or nothing, and it goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import Fault, Hub, turn_client
from hub_store import Pull
from watching import watched

import fp4conv
from fp4conv.cli import main
from fp4conv.commands.convert import plan_conversion
from fp4conv.errors import Fp4convError, OutputError, ResumeError, UsageError
from fp4conv.publishing.card import BEGIN, END, read_metadata
from fp4conv.publishing.publication import Publication
from fp4conv.sizes import as_option
from fp4conv.streaming import smallest_disk
from fp4conv.synthetic import write_checkpoint

REPO = "owner/made"
CARD = "README.md"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "my-gpt-oss"
    write_checkpoint(folder, nbytes=16_000_000, family="gpt-oss", seed=3, max_shard_bytes=3_000_000)
    (folder / CARD).write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat, bf16]\n---\n# The base\nText of the base.\n"
    )
    return folder


@pytest.fixture(scope="module")
def local(source: Path) -> Path:
    """The same conversion, to a folder and nowhere else."""
    folder = source.parent / "local"
    fp4conv.convert(source, folder, to="mxfp4", max_shard_size="500kB")
    return folder


OPTIONS: dict[str, str] = {"to": "mxfp4", "max_shard_size": "500kB"}


def published(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    """What main has, but for the card."""
    return {name: content for name, content in hub.files(repo).items() if name != CARD}


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != CARD}


def pulls(hub: Hub, repo: str = REPO) -> list[Pull]:
    return list(hub.store.repos[repo].pulls.values())


def test_a_conversion_is_published_whole_by_one_pull_request(
    hub: Hub, source: Path, local: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    result = fp4conv.convert(
        source,
        tmp_path / "dst",
        push_to_hub=REPO,
        on_upload=lambda *sizes: told.append(sizes),
        **OPTIONS,  # type: ignore[arg-type]
    )
    assert published(hub) == contents(local)
    assert contents(tmp_path / "dst") == contents(local)
    (pull,) = pulls(hub)
    assert pull.status == "merged"
    repo = hub.store.repos[REPO]
    assert [ref for ref, _ in repo.log].count("main") == 2  # its first commit, and the merge
    assert len([ref for ref, _ in repo.log if ref == pull.ref]) > 3  # shards went out one by one
    assert result.published is not None
    assert result.to_json()["published"] == {
        "repo": REPO,
        "url": f"{hub.endpoint}/{REPO}",
        "pull_request": f"{hub.endpoint}/{REPO}/discussions/1",
        "commit": repo.refs["main"],
        "files": len(contents(local)) + 1,
        "deleted": [],
    }
    assert not repo.private
    assert told[0][0] == 0
    assert told[-1][0] >= 0.99 * told[-1][1]


def test_the_card_says_what_it_is_and_keeps_the_licence(hub: Hub, source: Path, tmp_path: Path) -> None:
    import yaml

    result = fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, command="fp4conv convert mine", **OPTIONS)  # type: ignore[arg-type]
    text = hub.files(REPO)[CARD].decode()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert metadata["tags"] == ["chat", "fp4conv", "mxfp4", "fp4", "4-bit"]
    assert "base_model" not in metadata  # a folder has no name on the Hub
    assert f"{result.sqnr_db:.2f} dB" in body
    assert "$ fp4conv convert mine" in body
    assert "`mse`" in body
    assert fp4conv.__version__ in body
    assert str(source.parent) not in text
    for verdict in result.servers:
        assert verdict.server in body


def test_streaming_keeps_nothing_here_and_stays_within_its_bound(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    least = smallest_disk(plan_conversion(source, **OPTIONS), {})  # type: ignore[arg-type]
    with watched(tmp_path / "fp4conv-owner--made.partial") as peak:
        result = fp4conv.convert(source, push_to_hub=REPO, stream=True, max_disk=least, **OPTIONS)  # type: ignore[arg-type]
    assert 0 < peak[0] <= least
    assert least < sum(map(len, contents(local).values())) / 2
    assert published(hub) == contents(local)
    assert result.destination == f"{hub.endpoint}/{REPO}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub-content"]


def test_from_hub_to_hub_on_a_disk_smaller_than_the_model(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/base", source)
    monkeypatch.chdir(tmp_path)
    options = ["--to", "mxfp4", "--max-shard-size", "500kB", "--stream", "--push-to-hub", REPO, "--json"]
    planned = json.loads(CliRunner().invoke(main, ["convert", "org/base", *options, "--dry-run"]).stdout)
    shown = CliRunner().invoke(main, ["convert", "org/base", *options[:-1], "--dry-run"]).stdout
    assert f"publishes  {hub.endpoint}/{REPO}" in shown
    assert REPO not in hub.store.repos
    least = planned["download"]["least_max_disk_bytes"]
    bound = f"{-(-least // 1000)}kB"
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert least < 0.7 * weights
    with watched(tmp_path / "fp4conv-owner--made.partial") as peak:
        done = CliRunner().invoke(main, ["convert", "org/base", *options, "--max-disk", bound])
    assert done.exit_code == 0, done.stderr
    assert 3_000_000 < peak[0] <= least + 1000
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))
    assert published(hub) == contents(local)
    card = hub.files(REPO)[CARD].decode()
    assert "base_model:\n- org/base\nbase_model_relation: quantized\n" in card
    assert f"https://huggingface.co/org/base/tree/{commit}" in card
    short = CliRunner().invoke(main, ["convert", "org/base", *options, "--max-disk", "1MB"])
    assert short.exit_code == 1
    assert f"the least that works is --max-disk {as_option(least)}" in short.stderr


def test_the_licence_of_a_folder_in_a_repository_is_that_of_the_repository(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"sub/{name}": content for name, content in contents(source).items()}
    hub.add("org/base", {**files, CARD: b"---\nlicense: gemma\n---\n"})
    monkeypatch.chdir(tmp_path)
    fp4conv.convert("hf://org/base/sub", push_to_hub=REPO, stream=True, to="bf16")
    card = hub.files(REPO)[CARD].decode()
    assert "license: gemma" in card
    assert "base_model:\n- org/base\n" in card
    assert "Nothing was quantised." in card


def test_an_adapter_is_merged_from_hub_to_hub(
    hub: Hub, reference: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = reference("llama-bf16"), reference("lora-variants/llama-patterns/adapter")
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["merge-lora", "org/base", "org/adapter", "--stream", "--push-to-hub", REPO])
    assert done.exit_code == 0, done.stderr
    fp4conv.merge_lora(base, adapter, tmp_path / "local")
    assert published(hub) == contents(tmp_path / "local")
    card = hub.files(REPO)[CARD].decode()
    assert "base_model:\n- org/base\n- org/adapter\nbase_model_relation: finetune\n" in card
    assert "with [org/adapter](https://huggingface.co/org/adapter) (" in card
    assert "Nothing was quantised." in card


# ---- faults


def test_hiccups_of_the_hub_are_sat_out(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr("fp4conv.publishing.repository.QUOTA_PAUSE", 0.01)
    hub.faults += [
        Fault("POST .*/commit/", status=500, times=2),
        Fault("POST .*/commit/", status=429, times=3),
        Fault("PUT /upload/", status=503),
        Fault("PUT /upload/", cut_after=100_000),
        Fault("GET .*/tree/", status=502),
        Fault("POST .*/discussions$", status=500),
        Fault("POST .*/status$", status=500),
        Fault("POST .*/merge$", status=504),
    ]
    notes: list[str] = []
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, on_note=notes.append, **OPTIONS)  # type: ignore[arg-type]
    assert [note.partition(";")[0] for note in notes[1:]] == ["the Hub takes no more commits for now"] * 3
    assert published(hub) == contents(local)


def test_metadata_that_the_hub_refuses_is_left_out(hub: Hub, source: Path, tmp_path: Path) -> None:
    """At the very end, when hours of work are there already, is no time to fail for a licence of an unknown name."""
    hub.faults.append(Fault("POST /api/validate-yaml", status=400))
    notes: list[str] = []
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, on_note=notes.append, **OPTIONS)  # type: ignore[arg-type]
    card = hub.files(REPO)[CARD].decode()
    assert set(read_metadata(card)) == {"library_name", "tags"}
    assert card.count(BEGIN) == card.count(END) == 1
    assert "left out" in notes[-1]


def test_an_answer_that_is_lost_makes_no_second_commit(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit was made, and the client did not hear of it."""
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", (0.01,))
    from fp4conv.publishing.repository import Repository

    once = Repository._commit_once
    lost: list[str] = []

    def lose(self: Repository, *arguments: object) -> object:
        answer = once(self, *arguments)  # type: ignore[arg-type]
        if not lost:
            lost.append("answer")
            raise ConnectionError("lost on the way")
        return answer

    monkeypatch.setattr(Repository, "_commit_once", lose)
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert lost
    assert published(hub) == contents(local)
    titles = [hub.store.repos[REPO].commits[sha].title for ref, sha in hub.store.repos[REPO].log if ref != "main"]
    assert len(titles) == len(set(titles))


def test_a_failure_leaves_main_as_it_was_and_the_same_call_goes_on(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", ())
    hub.faults.append(Fault("POST .*/merge", status=500))
    with pytest.raises(OutputError, match=r"(?s)pull request .*/discussions/1.*The same command goes on"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == {}
    assert not (tmp_path / "dst").exists()
    uploads = hub.count("PUT /upload/")
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == contents(local)
    assert hub.count("PUT /upload/") == uploads
    assert len(pulls(hub)) == 1


def test_a_shard_that_the_hub_lost_is_sent_again(
    hub: Hub, source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal alone is not believed."""
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", ())
    hub.faults.append(Fault("POST .*/merge", status=500))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError):
        fp4conv.convert(source, push_to_hub=REPO, stream=True, **OPTIONS)  # type: ignore[arg-type]
    (pull,) = pulls(hub)
    shards = sorted(name for name in hub.files(REPO, pull.ref) if name.endswith(".safetensors"))
    hub.change(REPO, {shards[0]: b"other bytes"}, shards[1], ref=pull.ref)
    fp4conv.convert(source, push_to_hub=REPO, stream=True, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == contents(local)


def test_a_pull_request_that_is_not_what_was_sent_is_not_merged(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Publication._check_whole

    def meddle(self: Publication, *arguments: object) -> None:
        hub.change(REPO, {"model-00002-of-00008.safetensors": b"x", "config.json": b"{}"}, ref="refs/pr/1")
        check(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Publication, "_check_whole", meddle)
    with pytest.raises(OutputError, match=r"does not have what was sent: config\.json"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == {}


def test_a_closed_pull_request_is_not_gone_on_with(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", ())
    hub.faults.append(Fault("POST .*/merge", status=500))
    with pytest.raises(OutputError):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    pulls(hub)[0].status = "closed"
    with pytest.raises(ResumeError, match=r"was closed\n  Reopen it there to go on"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]


# ---- repositories that are there


def test_a_model_that_is_there_stays_unless_it_is_to_be_replaced(
    hub: Hub, source: Path, local: Path, tmp_path: Path
) -> None:
    old = {
        "config.json": b"{}",
        "model-00001-of-00001.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "hf_quant_config.json": b"{}",
        "fp4conv/hints.json": b"{}",
        "LICENSE": b"mine",
        "picture.png": b"png",
        CARD: b"---\nlicense: mit\n---\n# Mine\nMy own words.\n",
    }
    hub.add(REPO, old)
    with pytest.raises(
        OutputError, match=r"has a model already \(config.json, .*\n  Give another repository, or add --ov"
    ):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "dst.partial").exists()
    assert hub.files(REPO) == old
    result = fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, overwrite=True, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == {**contents(local), "LICENSE": b"mine", "picture.png": b"png"}
    assert result.published is not None
    assert result.published.deleted == (
        "fp4conv/hints.json",
        "hf_quant_config.json",
        "model-00001-of-00001.safetensors",
    )
    card = hub.files(REPO)[CARD].decode()
    assert "license: mit" in card  # the repository's owner has the last word
    assert card.endswith(f"{END}\n\n# Mine\nMy own words.\n")
    assert card.count(BEGIN) == 1


@pytest.mark.parametrize("repo", ["owner/base", "Owner/Base"])
def test_a_source_is_never_written_to(hub: Hub, source: Path, tmp_path: Path, repo: str) -> None:
    hub.add("owner/base", source)
    command = ["convert", "owner/base", str(tmp_path / "dst"), "--to", "mxfp4", "--push-to-hub", repo, "--overwrite"]
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, [*command, *more])
        assert done.exit_code == 1
        assert "is what is converted, and a source is never written to\n  Give another repository." in done.stderr
    assert hub.files("owner/base") == {path.name: path.read_bytes() for path in source.iterdir()}
    assert not list(tmp_path.glob("dst*"))


def test_a_repository_with_words_alone_takes_a_model(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, {CARD: b"# Soon here\n", "LICENSE": b"mine"})
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    files = hub.files(REPO)
    assert files["LICENSE"] == b"mine"
    assert files[CARD].decode().endswith("# Soon here\n")


def test_private_makes_a_private_repository_and_mistrusts_a_public_one(hub: Hub, source: Path, tmp_path: Path) -> None:
    fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, private=True, **OPTIONS)  # type: ignore[arg-type]
    assert hub.store.repos[REPO].private
    hub.add("owner/public", {"notes.txt": b"x"})
    with pytest.raises(OutputError, match="exists already and is public"):
        fp4conv.convert(source, tmp_path / "other", push_to_hub="owner/public", private=True, **OPTIONS)  # type: ignore[arg-type]


def test_a_model_that_somebody_else_publishes_meanwhile_stays(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Publication.recognise

    def meddle(self: Publication, names: Collection[str]) -> dict[str, Path]:
        hub.change(REPO, {"other.safetensors": b"x"})
        return begun(self, names)

    monkeypatch.setattr(Publication, "recognise", meddle)
    with pytest.raises(OutputError, match=r"main has got a model meanwhile \(other.safetensors\)"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert published(hub) == {"other.safetensors": b"x"}


@pytest.mark.parametrize(
    ("token", "match"),
    [
        ("", "needs a login, and there is none"),
        ("hf_wrong", r"401(.|\n)*token is not valid"),
        ("hf_reader", r"403(.|\n)*Your login may not do this in owner/made"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_made(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, token: str, match: str
) -> None:
    hub.add(REPO, {"notes.txt": b"x"})
    turn_client(monkeypatch, hub, tmp_path / "hub-cache", token)
    with pytest.raises(Fp4convError, match=match) as caught:
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert "hf auth login" in str(caught.value)
    assert not (tmp_path / "dst.partial").exists()
    assert published(hub) == {"notes.txt": b"x"}


def test_a_repository_without_pull_requests_is_named(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(REPO, {"notes.txt": b"x"})
    hub.without_pulls.add(REPO)
    with pytest.raises(OutputError, match=r"are disabled for this repo(.|\n)*Allow pull requests in its settings"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "dst.partial").exists()


def test_without_a_network_it_says_so_at_once(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", (1000.0,))
        with pytest.raises(OutputError, match=r"cannot be reached(.|\n)*Check the connection and HF_ENDPOINT, and run"):
            fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set, so nothing can be published"):
        fp4conv.convert(source, tmp_path / "dst", push_to_hub=REPO, **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "dst.partial").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"private": True, "destination": "dst"}, "--private is about the repository"),
        ({"max_disk": "1GB", "destination": "dst"}, "--max-disk bounds what --stream"),
        ({"stream": True, "destination": "dst"}, "--stream has nothing to let go of"),
        ({}, "a DST is needed"),
        ({"push_to_hub": REPO}, "a DST is needed"),
        ({"push_to_hub": "made", "destination": "dst"}, "'made' is not the name of a repository"),
        ({"push_to_hub": "a/b/c", "destination": "dst"}, "is not the name of a repository"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        fp4conv.convert(source, **OPTIONS, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---- kills

# As the command, with a pause a unit and a commit, so that a kill finds it half done.
SLOW = """
import importlib, time
run = importlib.import_module("fp4conv.pipeline.run")
run.CHECKPOINT_SECONDS = 0.01
work = run.work
def slow(*arguments):
    time.sleep(0.002)
    return work(*arguments)
run.work = slow
from fp4conv.cli import main
main()
"""


@pytest.mark.parametrize(
    ("after", "times", "stream"),
    [
        ("POST .*/commit/", 3, True),
        ("PUT /upload/", 5, False),
        ("POST .*/merge", 1, True),
    ],
)
def test_a_kill_in_the_middle_of_a_push_loses_nothing(
    hub: Hub, source: Path, local: Path, tmp_path: Path, *, after: str, times: int, stream: bool
) -> None:
    hub.add("org/base", source)
    command = ["convert", *(["org/base"] if stream else [str(source), "dst"]), "--to", "mxfp4"]
    command += ["--max-shard-size", "500kB"]
    command += ["--push-to-hub", REPO, "--json", *(["--stream"] if stream else [])]
    environment = {**os.environ, **hub.environment(tmp_path / "hub-cache", "hf_owner")}
    environment["PYTHONPATH"] = str(Path(fp4conv.__file__).parent.parent)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SLOW, *command], cwd=tmp_path, env=environment, **pipes) as process:  # type: ignore[call-overload]
        while process.poll() is None and hub.count(after) < times:
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
    assert published(hub) in ({}, contents(local))
    assert len(list(tmp_path.glob("*.partial"))) == 1
    again = [sys.executable, "-m", "fp4conv", *command]
    done = subprocess.run(again, cwd=tmp_path, env=environment, **pipes, check=False)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)["published"]
    assert (found["repo"], found["commit"]) == (REPO, hub.store.repos[REPO].refs["main"])
    assert published(hub) == contents(local)
    assert len(pulls(hub)) == 1
    if not stream:
        assert contents(tmp_path / "dst") == contents(local)
    assert not list(tmp_path.glob("*.partial"))
