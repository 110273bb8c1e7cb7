"""Files that fp4conv reads and other programs stop at: `verify` must not pass them as sound.

What transformers 5.23.0 and vLLM 0.32.0 do with each was run: both stop at a byte order mark and at a
quantization_config that is a string; vLLM at architectures that are a string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from checkpoints import INDEX, array_of, config_of, read_raw, write_model

import fp4conv
from fp4conv.cli import main
from fp4conv.report.verified import Verified

Reference = Callable[[str], Path]


def llama(reference: Reference, folder: Path, changes: Mapping[str, object], *, shards: bool = False) -> Path:
    """The reference model; a change to None takes the key away."""
    raw = read_raw(reference("llama-bf16"))
    config = {**config_of(reference("llama-bf16")), **changes}
    held = {key: value for key, value in config.items() if value is not None}
    names = sorted(raw)
    return write_model(
        folder, {name: array_of(raw[name]) for name in names}, held, [names[:9], names[9:]] if shards else ()
    )


def told(found: Verified, severity: str = "error") -> set[tuple[str, str | None]]:
    return {(problem.kind, problem.file) for problem in found.problems if problem.severity.value == severity}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"quantization_config": "nvfp4"}, "odd-config"),
        ({"quantization_config": ["nvfp4"]}, "odd-config"),
        ({"text_config": 3}, "odd-config"),
        ({"architectures": "LlamaForCausalLM"}, "odd-config"),
        ({"architectures": [3]}, "odd-config"),
        ({"model_type": None}, "bad-config"),
        ({"model_type": ""}, "bad-config"),
        ({"model_type": ["llama"]}, "bad-config"),
    ],
)
def test_entries_of_another_type(reference: Reference, tmp_path: Path, changes: dict[str, object], kind: str) -> None:
    assert (kind, "config.json") in told(fp4conv.verify(llama(reference, tmp_path / "model", changes)))


def test_what_every_program_takes(reference: Reference, tmp_path: Path) -> None:
    folder = llama(reference, tmp_path / "model", {"architectures": None})
    model = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**model, "quantization_config": None, "text_config": None}))
    assert not fp4conv.verify(folder).problems


def test_openais_config_needs_no_model_type(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "out", to="mxfp4", layout="openai-original")
    assert "model_type" not in config_of(tmp_path / "out")
    assert fp4conv.verify(tmp_path / "out").ok


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_byte_order_mark(reference: Reference, tmp_path: Path, name: str) -> None:
    folder = llama(reference, tmp_path / "model", {}, shards=True)
    assert fp4conv.verify(folder).ok
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert told(fp4conv.verify(folder)) == {("odd-config", name)}
    fp4conv.convert(folder, tmp_path / "out", to="f32")  # which writes it without the mark
    assert fp4conv.verify(tmp_path / "out").ok


def test_no_layers_promised_beside_layers(reference: Reference, tmp_path: Path) -> None:
    """As where any other number of layers is too small."""
    kinds = {}
    for layers in (0, 1):
        folder = llama(reference, tmp_path / str(layers), {"num_hidden_layers": layers})
        found = fp4conv.verify(folder, for_server="vllm").problems
        kinds[layers] = {problem.tensor for problem in found if problem.kind == "unknown-tensor"}
    assert {name for name in kinds[0] if name and ".layers.1." in name} <= kinds[1] < kinds[0]


def test_files_without_a_tensor(tmp_path: Path) -> None:
    assert told(fp4conv.verify(write_model(tmp_path / "model", {}, {"model_type": "llama"}))) == {
        ("not-a-checkpoint", None)
    }


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", INDEX])
def test_links_that_lead_nowhere(
    reference: Reference, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Hub's cache has them when a download was cut short: a problem like others, and the rest is looked at."""
    folder = llama(reference, tmp_path / "model", {}, shards=True)
    other = folder / "model-00002-of-00002.safetensors"
    other.write_bytes(other.read_bytes()[:-1])
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder), "--json"])
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    problems = {problem["file"]: problem for problem in found["problems"] if problem["severity"] == "error"}
    assert problems[name]["found"] == "is a link to ../../blobs/0123, which is not there"
    assert "truncated" in problems[other.name]["found"]
