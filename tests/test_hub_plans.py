"""What docs/hub.md says that gpt-oss takes of the disk, the network and the memory is what the plan says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fp4conv.commands.convert import plan_conversion
from fp4conv.plan import peak_bytes
from fp4conv.safetensors_io import lay_out
from fp4conv.sizes import format_size
from fp4conv.streaming import smallest_disk, source_files
from fp4conv.synthetic import share_out
from fp4conv.synthetic.companions import companion_files
from fp4conv.synthetic.shapes import FAMILIES, Geometry, Tensor, model_bytes, model_tensors

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hub.md"
GPT_OSS_20B = replace(FAMILIES["gpt-oss"], format="mxfp4")
MODELS = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": replace(GPT_OSS_20B, layers=36, experts=128)}
PUBLISHED_BYTES = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}  # total_size in their indexes
SHARD_BYTES = 4_800_000_000


@pytest.fixture(scope="module", params=MODELS)
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the real shapes, of which the disk holds the headers alone."""
    folder = tmp_path_factory.mktemp("sparse") / str(request.param)
    write_sparse(folder, MODELS[request.param])
    return folder


def write_sparse(folder: Path, geometry: Geometry) -> None:
    folder.mkdir()
    shards = share_out(sorted(model_tensors(geometry), key=_as_text), SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        layout = lay_out([(tensor.name, tensor.spec) for tensor in shard])
        with (folder / file).open("wb") as stream:
            stream.write(layout.header)
            stream.truncate(layout.nbytes)
        weight_map |= {tensor.name: file for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in companion_files(geometry).items():
        (folder / name).write_text(text)


def _as_text(tensor: Tensor) -> tuple[bool, str]:
    """The order of their published shards: layers as text (0, 1, 10, ...), what is in no layer last."""
    parts = tensor.name.split(".")
    return (False, parts[2]) if "layers" in parts else (True, "")


@pytest.mark.parametrize("to", ["bf16", "nvfp4"])
def test_the_page_says_what_the_plan_says(sparse: Path, to: str) -> None:
    assert model_bytes(MODELS[sparse.name]) == PUBLISHED_BYTES[sparse.name]
    plan = plan_conversion(sparse, to=to)
    source = {file.name: file.nbytes for file in plan.model.source.files if file.weights}
    download = sum(source.values())
    least = smallest_disk(plan, source, result_stays=True)
    sizes = (download, plan.total_bytes, plan.disk_bytes + download, least)
    command = f"fp4conv convert openai/{sparse.name} {sparse.name}-{to} --to {to}"
    row = f"| `{command}` | " + " | ".join(map(format_size, sizes)) + " |"
    text = PAGE.read_text(encoding="utf-8")
    assert row in text
    bounds = re.search(r"at most (\d+) MB of memory with two workers, (\d+) MB with eight", text)
    assert bounds is not None
    leaving = format_size(smallest_disk(plan, source))
    assert f"| `fp4conv convert openai/{sparse.name} --to {to} --stream --push-to-hub REPO` | {leaving} |" in text
    for most, workers in zip(bounds.groups(), (2, 8), strict=True):
        assert peak_bytes(plan, 10**9, workers) <= int(most) * 10**6


def test_files_of_the_source_are_worked_on_one_after_the_other(sparse: Path) -> None:
    """Though they are cut along layers as text, and a plan by layers would go to and fro between them."""
    plan = plan_conversion(sparse, to="mxfp4")
    visited = [source_files(step)[0] for step in plan.steps]
    changes = [file for before, file in zip(["", *visited], visited, strict=False) if file != before]
    assert changes == sorted(set(visited))
    layers = [int(found[1]) for step in plan.steps if (found := re.search(r"layers\.(\d+)\.", step.key))]
    assert layers != sorted(layers)
