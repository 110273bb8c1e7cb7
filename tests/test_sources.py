"""A folder as a source: the index decides, nothing leads out of the folder, and every refusal says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from fp4conv.errors import SourceError
from fp4conv.families import natural_key
from fp4conv.model import Source
from fp4conv.sources import LocalSource, open_adapter, open_source

INDEX = "model.safetensors.index.json"


def shard(path: Path, *names: str) -> None:
    safetensors.numpy.save_file({name: np.full(3, len(name), np.float32) for name in names}, path)


def index(folder: Path, weight_map: Mapping[str, object], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards and an index, as transformers saves them."""
    folder = tmp_path / "model"
    folder.mkdir()
    shard(folder / "model-00001-of-00002.safetensors", "a", "b")
    shard(folder / "model-00002-of-00002.safetensors", "c")
    index(folder, {name: f"model-0000{1 + (name == 'c')}-of-00002.safetensors" for name in "abc"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def names_in(path: Path) -> list[str]:
    with safetensors.safe_open(path, "np") as file:
        return list(file.keys())


def refusal(folder: Path | str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_source(folder)
    return caught.value


# ---- what is read


def test_sharded_checkpoint(checkpoint: Path) -> None:
    source = open_source(str(checkpoint))
    as_protocol: Source = source
    assert list(as_protocol.tensors) == ["a", "b", "c"]
    assert source.warnings == ()
    assert source.name == str(checkpoint)
    assert {entry.name: entry.weights for entry in source.files} == {
        "config.json": False,
        "model-00001-of-00002.safetensors": True,
        "model-00002-of-00002.safetensors": True,
        INDEX: False,
    }
    ref = source.tensors["c"]
    found = np.zeros(3, np.float32)
    with source.reader() as reader:
        reader.read_into(ref.file, ref.offset, found)
    assert found.tolist() == [1, 1, 1]


def test_references_open_without_a_warning(reference: Callable[[str], Path]) -> None:
    """Checkpoints of transformers and ModelOpt, single and sharded, counted from one and from zero."""
    for name in ("gptoss-bf16", "gptoss-mxfp4-native-like", "gptoss-nvfp4-default", "llama-bf16"):
        folder = reference(name)
        source = open_source(folder)
        assert source.warnings == ()
        named = {name for path in folder.glob("*.safetensors") for name in names_in(path)}
        assert set(source.tensors) == named
        assert source.json("config.json") is not None


def test_tensors_come_in_natural_order_of_files_and_then_by_offset(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        shard(tmp_path / f"part{number}.safetensors", f"z{number}", f"a{number}")
    assert list(open_source(tmp_path).tensors) == ["a1", "z1", "a9", "z9", "a10", "z10"]
    assert sorted(["x10y2", "x9", "x10y10", "x"], key=natural_key) == ["x", "x9", "x10y2", "x10y10"]


def test_single_file_and_other_names(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    shard(tmp_path / "consolidated.safetensors", "a")
    shard(tmp_path / "adapter_model.safetensors", "lora")
    source = open_source(tmp_path)
    assert list(source.tensors) == ["a"]
    assert source.warnings == ()
    shard(tmp_path / "old.safetensors", "a")
    assert open_source(tmp_path).warnings == (
        "not read, since model.safetensors decides what the weights are: old.safetensors",
    )


def test_index_of_another_name(tmp_path: Path) -> None:
    shard(tmp_path / "diffusion-1.safetensors", "a")
    index(tmp_path, {"a": "diffusion-1.safetensors"}, "diffusion.safetensors.index.json")
    assert list(open_source(tmp_path).tensors) == ["a"]
    index(tmp_path, {"a": "diffusion-1.safetensors"}, "second.safetensors.index.json")
    assert "several indexes" in str(refusal(tmp_path))
    index(tmp_path, {"a": "diffusion-1.safetensors"})
    assert open_source(tmp_path).warnings == (
        f"diffusion.safetensors.index.json: not read, {INDEX} is",
        f"second.safetensors.index.json: not read, {INDEX} is",
    )


def test_hidden_files_and_folders_are_ignored(checkpoint: Path) -> None:
    (checkpoint / ".cache").mkdir()
    (checkpoint / "original").mkdir()
    shard(checkpoint / ".hidden.safetensors", "x")
    shard(checkpoint / "original" / "model.safetensors", "x")
    source = open_source(checkpoint)
    assert len(source.files) == 4
    assert source.warnings == ()


def test_openai_original_folder_has_no_index(tmp_path: Path) -> None:
    for number in range(3):  # gpt-oss counts from zero and calls the last number the total
        shard(tmp_path / f"model-0000{number}-of-00002.safetensors", f"t{number}")
    assert list(open_source(tmp_path).tensors) == ["t0", "t1", "t2"]


def test_metadata_of_all_files(checkpoint: Path) -> None:
    safetensors.numpy.save_file({"c": np.zeros(1)}, checkpoint / "model-00002-of-00002.safetensors", {"format": "pt"})
    assert LocalSource(checkpoint).metadata == {"format": "pt"}


def test_adapter_is_opened_by_its_own_door(tmp_path: Path) -> None:
    shard(tmp_path / "adapter_model.safetensors", "lora_A")
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refusal(tmp_path)
    assert "LoRA adapter" in error.what
    assert "merge-lora" in str(error.hint)
    assert list(open_adapter(tmp_path).tensors) == ["lora_A"]
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path)


# ---- small files


def test_json_and_bytes(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    assert source.json("config.json") == {"model_type": "llama"}
    assert source.json("generation_config.json") is None
    assert source.read_bytes("config.json") == b'{"model_type": "llama"}'
    with pytest.raises(SourceError, match="at most 4 were expected"):
        source.read_bytes("config.json", limit=4)
    for name in ("../model/config.json", "/etc/hostname", "nothing.txt", ".."):
        with pytest.raises(SourceError, match=re.escape(name)):
            source.read_bytes(name)
        assert source.json(name) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "a": 1,\n  "b" 2\n}', r"config\.json: not valid JSON at line 3, column 7"),
        (b"", "line 1, column 1"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8'"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_unreadable_config_is_named(checkpoint: Path, content: bytes, message: str) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_source(checkpoint).json("config.json")


def test_byte_order_mark_is_not_an_error(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert open_source(checkpoint).json("config.json") == {"a": 1}


# ---- fingerprint


def test_fingerprint_follows_what_matters(checkpoint: Path, tmp_path: Path) -> None:
    first = open_source(checkpoint).fingerprint()
    assert open_source(checkpoint).fingerprint() == first
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    assert open_source(link).fingerprint() == first
    seen = {first}

    def now_differs() -> None:
        found = open_source(checkpoint).fingerprint()
        assert found not in seen
        seen.add(found)

    weights = checkpoint / "model-00002-of-00002.safetensors"
    os.utime(weights, ns=(1, 1))
    now_differs()
    shard(weights, "c", "d")
    os.utime(weights, ns=(1, 1))
    now_differs()
    config = checkpoint / "config.json"
    times = config.stat().st_mtime_ns
    config.write_text('{"model_type": "gemma"}')  # as long as before, and as old
    os.utime(config, ns=(times, times))
    now_differs()
    (checkpoint / "tokenizer.json").write_text("{}")
    now_differs()


# ---- what is refused


def test_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    error = refusal(checkpoint)
    assert error.where == INDEX
    assert "1 are missing: model-00002-of-00002.safetensors" in error.what
    (checkpoint / INDEX).unlink()
    error = refusal(checkpoint)
    assert "of 2 shards 1 are missing, number 2" in error.what


def test_absurd_numbering_takes_no_memory(tmp_path: Path) -> None:
    shard(tmp_path / "model-00001-of-999999999.safetensors", "a")
    assert "of 999999999 shards 999999998 are missing, number 2" in refusal(tmp_path).what


def test_missing_and_misplaced_tensors_are_named(checkpoint: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    first = "model-00001-of-00002.safetensors"
    index(checkpoint, {"a": first, "b": first, "c": second, "d": second})
    assert f"tensor 'd' should be in {second}, but no shard has it" in refusal(checkpoint).what
    index(checkpoint, {"a": first, "b": second, "c": second})
    assert f"tensor 'b' should be in {second}, but it is in {first}" in refusal(checkpoint).what


def test_tensor_that_the_index_lacks_is_taken_along_with_a_warning(checkpoint: Path) -> None:
    shard(checkpoint / "model-00002-of-00002.safetensors", "c", "extra")
    source = open_source(checkpoint)
    assert "extra" in source.tensors
    assert source.warnings == (f"{INDEX}: does not name 1 tensors that its shards hold, taken along: extra",)


def test_file_that_the_index_lacks_is_not_read_with_a_warning(checkpoint: Path) -> None:
    shard(checkpoint / "stray.safetensors", "a")
    source = open_source(checkpoint)
    assert source.tensors["a"].file == "model-00001-of-00002.safetensors"
    assert source.warnings == (f"not read, since {INDEX} decides what the weights are: stray.safetensors",)


def test_duplicate_tensor_is_named_with_both_files(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a")
    shard(tmp_path / "two.safetensors", "a")
    assert str(refusal(tmp_path)).startswith("two.safetensors: tensor 'a' is also in one.safetensors")


@pytest.mark.parametrize(
    "hostile",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        ".hidden.safetensors",
        "passwd",
        "",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_index_cannot_lead_out_of_the_folder(checkpoint: Path, hostile: object) -> None:
    shard(checkpoint.parent / "model.safetensors", "a")
    index(checkpoint, {"a": hostile})
    error = refusal(checkpoint)
    assert error.where == INDEX
    assert "tensor 'a'" in error.what
    assert "plain" in str(error.hint)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_unusable_index_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / INDEX).write_text(content)
    assert refusal(checkpoint).where == INDEX


def test_truncated_shard_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    error = refusal(checkpoint)
    assert error.where == path.name
    assert "truncated" in error.what


def test_what_is_there_instead_of_safetensors(tmp_path: Path) -> None:
    assert "it has no files" in refusal(tmp_path).what
    (tmp_path / "notes.txt").touch()
    assert "it holds notes.txt" in refusal(tmp_path).what
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = refusal(tmp_path)
    assert "pickles, which can run code and are never opened: pytorch_model.bin" in error.what
    assert "safe_serialization" in str(error.hint)
    (tmp_path / "model-Q4.gguf").touch()
    assert "GGUF" in refusal(tmp_path).what
    (tmp_path / "original").mkdir()
    shard(tmp_path / "original" / "model.safetensors", "a")
    assert f"give {tmp_path / 'original'}" in str(refusal(tmp_path).hint)


def test_a_folder_of_the_hubs_cache_leads_to_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    shard(tmp_path / "blobs" / "1234", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    error = refusal(tmp_path)
    assert "at the top of the folder" in error.what
    assert f"The folder snapshots/abc in it has some: give {snapshot}" in str(error.hint)
    assert list(open_source(snapshot).tensors) == ["a"]


def test_not_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    error = refusal(checkpoint / "config.json")
    assert "is a file" in error.what
    assert str(checkpoint) in str(error.hint)
    error = refusal(tmp_path / "nowhere" / "deep" / "er")
    assert "no such folder" in error.what
    assert "repository on the Hub" in str(error.hint)
    assert "NUL" in refusal("a\0b").what


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "openai" / "gpt-oss-20b"
    folder.mkdir(parents=True)
    shard(folder / "model.safetensors", "a")
    assert list(open_source("openai/gpt-oss-20b").tensors) == ["a"]


# ---- links


def test_links_within_the_folder_are_followed_and_out_of_it_are_not(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model-00002-of-00002.safetensors"
    path.rename(checkpoint / "moved.bin")
    path.symlink_to("moved.bin")
    assert "c" in open_source(checkpoint).tensors
    (checkpoint / "moved.bin").rename(tmp_path / "outside.bin")
    path.unlink()
    path.symlink_to(tmp_path / "outside.bin")
    error = refusal(checkpoint)
    assert error.where == path.name
    assert "leads out of the folder" in error.what
    (tmp_path / "outside.bin").unlink()
    assert "which is not there" in refusal(checkpoint).what
    path.unlink()
    path.symlink_to(path.name)
    assert "which is not there" in refusal(checkpoint).what


def test_other_files_that_lead_out_are_left_out_with_a_warning(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").symlink_to("/etc/hostname")
    source = open_source(checkpoint)
    assert source.warnings == ("tokenizer.json: left out, it is a link that leads out of the folder",)
    assert source.json("tokenizer.json") is None


@pytest.mark.parametrize("subfolder", ["", "original"])
def test_hugging_face_cache_is_read(checkpoint: Path, tmp_path: Path, subfolder: str) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/HASH, the layout that huggingface_hub documents for its cache."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd" / subfolder
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path(*[".."] * (3 if subfolder else 2)) / "blobs" / f"{number:040x}")
    source = open_source(snapshot)
    assert list(source.tensors) == ["a", "b", "c"]
    assert source.json("config.json") == {"model_type": "llama"}
    found = np.zeros(3, np.float32)
    with source.reader() as reader:
        reader.read_into(source.tensors["a"].file, source.tensors["a"].offset, found)
    assert found.tolist() == [1, 1, 1]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    assert "leads out of the folder" in refusal(snapshot).what


def test_choice_of_files_can_be_given(checkpoint: Path) -> None:
    source = LocalSource(checkpoint, ["model-00002-of-00002.safetensors"])
    assert list(source.tensors) == ["c"]
    with pytest.raises(SourceError, match="no such file"):
        LocalSource(checkpoint, ["other.safetensors"])
