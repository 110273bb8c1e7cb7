"""`fp4conv push`: a finished folder, checked first, published whole; and the cards that publications carry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hub_server import Fault, Hub

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import OutputError, SourceError
from fp4conv.publishing.card import BEGIN, END, Card, Part, read_metadata, write_card
from fp4conv.publishing.publication import Publication
from fp4conv.publishing.repository import Repository, replaced
from fp4conv.sources import LocalSource

REPO = "owner/pushed"
Reference = Callable[[str], Path]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(reference: Reference, tmp_path: Path) -> Path:
    """A checkpoint that ModelOpt wrote, with more beside it than belongs on the Hub."""
    made = tmp_path / "my-llama"
    shutil.copytree(reference("llama-nvfp4-default"), made)
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json"):
        (made / name).write_bytes(b"{}")
    (made / "LICENSE").write_text("words")
    return made


def weights_and_configs(folder: Path) -> dict[str, bytes]:
    left = ("training_args.bin", "optimizer.pt", "trainer_state.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left}


def test_a_folder_is_published_with_what_belongs_to_it(hub: Hub, folder: Path) -> None:
    done = run("push", folder, REPO, "--private", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    files = hub.files(REPO)
    card = files.pop("README.md").decode()
    assert files == weights_and_configs(folder)
    assert sorted(facts["left_out"]) == ["optimizer.pt", "trainer_state.json", "training_args.bin"]
    repo = hub.store.repos[REPO]
    assert facts["published"]["commit"] == repo.refs["main"]
    assert repo.private
    assert [pull.status for pull in repo.pulls.values()] == ["merged"]
    assert "| format | NVFP4" in card
    assert "`q_proj`" in card
    assert "Not measured" in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["fp4conv", "nvfp4", "fp4", "4-bit", "modelopt"]


def test_what_people_see(hub: Hub, folder: Path) -> None:
    done = run("push", folder, REPO)
    assert done.exit_code == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}" in done.stdout
    assert "vllm" in done.stdout
    assert "warning: not published: optimizer.pt, trainer_state.json, training_args.bin" in done.stderr
    assert f"publishing by {hub.endpoint}/{REPO}/discussions/1" in done.stderr
    assert run("push", folder, REPO, "--overwrite", "--quiet").stderr == ""


def test_a_folder_with_an_error_is_not_published(hub: Hub, folder: Path) -> None:
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-7])
    done = run("push", folder, REPO)
    assert done.exit_code == 1
    assert "so it is not published" in done.stderr
    assert f"fp4conv verify {folder}" in done.stderr
    assert REPO not in hub.store.repos


def test_a_stopped_push_goes_on_and_sends_nothing_twice(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.publishing.repository.PAUSES", ())
    hub.faults.append(Fault("POST .*/status", status=500))
    with pytest.raises(OutputError, match="the Hub answers 500"):
        fp4conv.push(folder, REPO)
    assert set(hub.files(REPO)) == set()
    sent = hub.count("PUT /upload/")
    assert sent
    fp4conv.push(folder, REPO)
    assert hub.count("PUT /upload/") == sent
    assert set(hub.files(REPO)) == {*weights_and_configs(folder), "README.md"}
    assert len(hub.store.repos[REPO].pulls) == 1


def test_a_draft_of_somebody_else_is_not_gone_on_with(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can open a pull request with the right title and wrong files."""
    hub.add(REPO, {"notes.txt": b"x"})
    source = LocalSource(folder.resolve())
    planted = hub.store.open_pull(hub.store.repos[REPO], f"NVFP4 by fp4conv ({source.fingerprint()[:12]})")
    hub.change(REPO, {"evil.safetensors": b"x"}, ref=planted.ref)
    monkeypatch.setattr(Repository, "check_login", lambda self: "somebody")
    fp4conv.push(folder, REPO)
    assert "evil.safetensors" not in hub.files(REPO)
    assert planted.status == "draft"


def test_the_words_of_the_folder_stay_below_ours_and_are_not_doubled(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: llama3\ntags: [mine]\n---\n# My model\nTrained on cats.\n")
    fp4conv.push(folder, REPO)
    first = hub.files(REPO)["README.md"].decode()
    assert read_metadata(first)["license"] == "llama3"
    assert read_metadata(first)["tags"] == ["mine", "fp4conv", "nvfp4", "fp4", "4-bit", "modelopt"]
    assert first.endswith(f"{END}\n\n# My model\nTrained on cats.\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    fp4conv.push(folder, REPO, overwrite=True)
    assert hub.files(REPO)["README.md"].decode() == first
    assert json.loads(hub.files(REPO)["generation_config.json"]) == {"temperature": 0.5}


def test_a_repository_is_looked_at_before_the_folder_is_read(hub: Hub, folder: Path) -> None:
    hub.add(REPO, {"model.safetensors": b"x"})
    with pytest.raises(OutputError, match="has a model already"):
        fp4conv.push(folder, REPO, on_verify=lambda _: pytest.fail("it was read"))


@pytest.mark.parametrize("given", ["not-there", "owner/model"])
def test_only_a_folder_can_be_pushed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("owner/model", {"model.safetensors": b"x"})
    with pytest.raises(SourceError, match="no such folder") as said:
        fp4conv.push(given, REPO)
    assert "Hub" not in str(said.value)


# ---- the Hub's quota of commits


def test_commits_beyond_the_first_are_spaced_and_take_what_has_come(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.publishing.publication.BURST", 2)
    monkeypatch.setattr("fp4conv.publishing.publication.SPACING_SECONDS", 1.0)
    names = [f"model-{number}.safetensors" for number in range(9)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    repository = Repository(REPO)
    repository.make(private=False)
    pull = repository.open_pull("nine", "owner", "")
    gone: list[str] = []
    with Publication(repository, pull, tmp_path) as publication:
        for name in names:
            publication.take(name, lambda name=name: gone.append(name))  # type: ignore[misc]
        publication.finish(names, lambda _: "card", overwrite=False)
    assert gone == names
    commits = [hub.store.repos[REPO].commits[sha].title for ref, sha in hub.store.repos[REPO].log if ref == pull.ref]
    assert commits[:2] == [f"Add {name}" for name in names[:2]]
    assert commits[2] == f"Add {names[2]} and 6 more"
    assert set(hub.files(REPO)) == {*names, "README.md"}


# ---- cards


CARD = Card(
    repo="me/made",
    source="org/base at commit " + "a" * 40,
    bases=("org/base", "org/adapter"),
    relation="quantized",
    format="mxfp4",
    layout="openai",
    rule="mse",
    parts=(
        Part("quantised, mxfp4", 24, 10_000_000, {"experts": 24}),
        Part("dense, head", 1, 5_000_000, {"lm_head": 1}),
    ),
    servers=(),
    version="1.2.3",
    command="fp4conv convert org/base --to mxfp4 --exclude 'a|b'",
    quantised=24,
    sqnr_db=18.25,
    worst=("model.layers.0.mlp.experts.down_proj", 17.5),
    adapters=("org/adapter",),
)


def test_a_card_in_full() -> None:
    text = write_card(
        CARD, "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nmodel-index: []\n---\nbase", ""
    )
    metadata = read_metadata(text)
    assert metadata == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "base_model": ["org/base", "org/adapter"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["fp4conv", "mxfp4", "fp4", "4-bit"],
    }
    assert "[org/base](https://huggingface.co/org/base) ([aaaaaaa](https://huggingface.co/org/base/tree/aaaaaaa" in text
    assert "with [org/adapter](https://huggingface.co/org/adapter) merged into it, in MXFP4" in text
    assert "| quantised, mxfp4 | 24 tensors, 10.0 MB: `experts` x24 |" in text
    assert "| dense, head | 1 tensor, 5.00 MB: `lm_head` |" in text
    assert "18.25 dB; the lowest is 17.50 dB, in `model.layers.0.mlp.experts.down_proj`." in text
    assert "$ fp4conv convert org/base --to mxfp4 --exclude 'a|b'" in text
    assert "base\n" not in text.partition(END)[2]


@pytest.mark.parametrize(
    "head",
    [
        "---\n[broken\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {deep: [1, 2]}\n---\n",
        "---\n" + "a: &a [x,x]\n" + "b: &b [*a,*a]\nlicense: [*b,*b]\n---\n",
        "---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
        "---\n" + "x: y\n" * 120_000 + "---\n",
        "no head at all",
        "\x00\ufeff---",
    ],
)
def test_a_base_card_that_is_broken_or_hostile_gives_nothing(head: str) -> None:
    assert "license" not in read_metadata(write_card(CARD, head + "text", ""))
    assert END in write_card(CARD, "", head + "text")


OWN = """---
license: mit
extra_gated_prompt: Say who you are.
extra_gated_fields: {Name: text, Country: {type: select, options: [a, b]}}
model-index: [{name: mine, results: [{metrics: [{type: acc, value: 0.5}, {type: n, value: 12}]}]}]
inference: false
version: 1.10
date: 2026-01-02
---
# Mine
"""


def test_what_the_owner_of_a_card_said_at_its_head_stays() -> None:
    """Who may have a gated model, results, a widget: whatever it is."""
    said = yaml.safe_load(OWN.split("---\n")[1])
    found = read_metadata(write_card(CARD, "", OWN))
    assert {key: found[key] for key in said} == {**said, "date": "2026-01-02"}
    assert found["base_model"] == ["org/base", "org/adapter"]


def test_a_language_is_no_truth_value() -> None:
    """The Hub reads YAML 1.2; in 1.1 Norwegian is false."""
    base = "---\nlicense: mit\nlanguage:\n- en\n- no\n---\n"
    text = write_card(CARD, base, "")
    assert read_metadata(text)["language"] == ["en", "no"]
    assert yaml.safe_load(text.split("---\n")[1])["language"] == ["en", "no"]  # so quoted that nobody errs


def test_a_long_head_is_read() -> None:
    results = "\n".join(f"  - {{type: acc, value: {number}}}" for number in range(5000))
    text = write_card(CARD, f"---\nmodel-index:\n- metrics:\n{results}\nlicense: mit\n---\n", "")
    assert read_metadata(text)["license"] == "mit"
    assert "model-index" not in read_metadata(text)  # it was measured on the base


def test_a_card_says_what_is_known_of_the_error() -> None:
    def cost(**known: object) -> str:
        text = write_card(replace(CARD, **known), "", "")  # type: ignore[arg-type]
        return text.partition("## What the format costs\n\n")[2].partition("\n")[0]

    assert cost(quantised=None).startswith("Not measured")
    assert cost(quantised=0, format="bf16").startswith("Nothing was quantised. Values are those of the source, rounded")
    assert cost(sqnr_db=None, worst=None) == "Nothing was lost: every value is as it was in the source."
    assert cost(lossy_blocks=1234).endswith("1,234 blocks of 16 values could not be held exactly.")


def test_a_card_that_is_written_again_is_the_same() -> None:
    old = "---\nlicense: mit\n---\n# Mine\n"
    once = write_card(CARD, "", old)
    assert write_card(CARD, "", once) == once
    assert once.count(BEGIN) == 1
    assert read_metadata(once)["license"] == "mit"


def test_what_an_older_checkpoint_leaves_goes_and_nothing_else() -> None:
    there = [
        "README.md", "LICENSE", "config.json", "tokenizer.json", "picture.png", "model-q4.gguf", "training.bin",
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "original/a.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json", "hf_quant_config.json",
        "fp4conv/records.safetensors", "fp4conv/hints.json",
    ]  # fmt: skip
    assert replaced(there, ["config.json", "model.safetensors"], "fp4conv") == tuple(sorted(there[8:]))
