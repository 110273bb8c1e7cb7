"""The reader of modelopt_state.pth gives what torch.load gives, and refuses every name that it does not need."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4conv.errors import SourceError
from fp4conv.modelopt_state import STATE_FILE, Quantizer, read_state

Reference = Callable[[str], Path]
MXFP4_BLOCKS = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
NVFP4_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}


def zipped(content: bytes, member: str = "state/data.pkl") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, content)
    return out.getvalue()


def saved(quantizers: object, mode: str = "quantize") -> bytes:
    """The file as ModelOpt saves it, by torch itself."""
    out = io.BytesIO()
    state = {"config": {}, "metadata": {"quantizer_state": quantizers}}
    torch.save({"modelopt_state_dict": [("kd_loss", {"metadata": {}}), (mode, state)], "modelopt_version": "0"}, out)
    return out.getvalue()


@pytest.mark.parametrize("name", ["gptoss-qat-fakequant-mxfp4", "llama-qat-fakequant-nvfp4-default"])
def test_it_reads_what_torch_reads(reference: Reference, name: str) -> None:
    path = reference(name) / STATE_FILE
    theirs = torch.load(path, weights_only=False)["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]
    ours = read_state(path.read_bytes())
    assert list(ours) == list(theirs)
    formats = {(8, 0): "mxfp4", (4, 3): "nvfp4"}
    for quantizer, facts in theirs.items():
        assert ours[quantizer].enabled is (not facts["_disabled"])
        if facts["_num_bits"] == (2, 1):
            assert ours[quantizer].format_name == formats[facts["_block_sizes"]["scale_bits"]]
    assert any(quantizer.enabled for quantizer in ours.values())


def test_formats_and_alterations() -> None:
    facts: dict[str, object] = {"_disabled": False, "_num_bits": (2, 1), "_block_sizes": MXFP4_BLOCKS}
    found = read_state(
        saved(
            {
                "a.weight_quantizer": facts,
                "b.weight_quantizer": {**facts, "_block_sizes": NVFP4_BLOCKS, "_rotate": True},
                "c.weight_quantizer": {**facts, "_num_bits": (4, 3), "_block_sizes": None},
                "d.weight_quantizer": {**facts, "_num_bits": 8, "_block_sizes": None},
                "lm_head.weight_quantizer": {**facts, "_disabled": True},
            }
        )
    )
    assert found["a.weight_quantizer"] == Quantizer("a.weight_quantizer", True, "mxfp4")
    assert found["b.weight_quantizer"] == Quantizer("b.weight_quantizer", True, "nvfp4", "rotate")
    assert found["c.weight_quantizer"].format_name == "fp8"
    assert found["d.weight_quantizer"].format_name == "num_bits 8, block_sizes None"
    assert not found["lm_head.weight_quantizer"].enabled


def test_the_known_names_are_plain_values() -> None:
    ordered = collections.OrderedDict({"_disabled": False, "_num_bits": (2, 1), "_block_sizes": MXFP4_BLOCKS})
    ordered["_pytorch_state_metadata"] = {"_amax": {"shape": torch.Size([]), "dtype": torch.float32}}
    assert read_state(saved({"x.weight_quantizer": ordered}))["x.weight_quantizer"].format_name == "mxfp4"


class Call:
    """Pickles as a call of `function`: what an attacker writes."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Call(os.system, "touch /tmp/fp4conv-was-here"), "posix.system"),
        (Call(eval, "1"), "builtins.eval"),
        (Call(getattr, "", "join"), "builtins.getattr"),
        (Call(torch.Tensor, [1.0]), "torch"),
        (Path("x"), "pathlib"),
    ],
)
def test_every_other_name_is_refused(payload: object, named: str) -> None:
    with pytest.raises(SourceError, match=f"names .*{named}.*not opened"):
        read_state(zipped(pickle.dumps({"modelopt_state_dict": payload})))
    assert not Path("/tmp/fp4conv-was-here").exists()


def test_stored_tensors_are_refused() -> None:
    out = io.BytesIO()
    torch.save({"modelopt_state_dict": torch.zeros(2)}, out)
    with pytest.raises(SourceError, match=r"stored tensors|names torch"):
        read_state(out.getvalue())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a file that torch.save wrote"),
        (b"PK\x03\x04 but no more", "not a file that torch.save wrote"),
        (zipped(b""), "pickle cannot be read"),
        (zipped(b"\x80\x02}q\x00("), "pickle cannot be read"),
        (zipped(b"cos\n"), "pickle cannot be read"),
        (zipped(pickle.dumps([1])), "no quantizer_state"),
        (zipped(pickle.dumps({"modelopt_state_dict": [("quantize", {})]})), "no quantizer_state"),
        (zipped(b"x", "state/other.pkl"), "0 data.pkl"),
        (zipped(b"\x80\x02ctorch\nbfloat16\n)R."), "pickle cannot be read"),  # calling a dtype
        (zipped(b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00xK\x01sb."), "pickle cannot be read"),  # setting on a type
    ],
)
def test_damage_is_refused_with_words(raw: bytes, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        read_state(raw)


def test_its_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4conv.modelopt_state.MAX_STATE_BYTES", 100)
    with pytest.raises(SourceError, match="at most 100"):
        read_state(zipped(b"x" * 101))
