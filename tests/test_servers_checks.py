"""The parts of scripts/servers that need no server: the comparison of bytes, the isolation, and what the docs hold."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, bf16, noise, write_model
from faults import FAULTS
from servers_checks import __main__ as command
from servers_checks import placement, sglang_checks, vllm_checks, vllm_faults
from servers_checks.isolated import Answer, isolated
from servers_checks.placement import SGLANG, VLLM, Names, Parameter
from servers_checks.vllm_engine import Outcome

DOC = (Path(__file__).resolve().parent.parent / "docs" / "servers.md").read_text(encoding="utf-8")
LLAMA = {
    "model.embed_tokens.weight": noise((8, 4), 0),
    "model.layers.0.self_attn.q_proj.weight": noise((4, 4), 1),
    "model.layers.0.self_attn.k_proj.weight": noise((2, 4), 2),
    "model.layers.0.self_attn.v_proj.weight": noise((2, 4), 3),
    "model.layers.0.mlp.up_proj.weight": noise((6, 4), 4),
    "model.layers.0.mlp.gate_proj.weight": noise((6, 4), 5),
}
GPT_OSS = {
    "model.embed_tokens.weight": noise((8, 4), 0),
    "model.layers.0.mlp.experts.gate_up_proj": noise((2, 4, 6), 1),
    "model.layers.0.mlp.experts.gate_up_proj_bias": noise((2, 6), 2),
}
EXPERTS = {
    "model.layers.0.mlp.experts.0.gate_proj.weight_scale_2": np.array(1, np.float32),
    "model.layers.0.mlp.experts.0.up_proj.weight_scale_2": np.array(2, np.float32),
    "model.layers.0.mlp.experts.1.gate_proj.weight_scale_2": np.array(3, np.float32),
    "model.layers.0.mlp.experts.1.up_proj.weight_scale_2": np.array(4, np.float32),
}


def parameter(values: Array) -> Parameter:
    names = {"bfloat16": "bfloat16", "float32": "float32"}
    return Parameter(names[values.dtype.name], values.shape, np.ascontiguousarray(values).tobytes())


def stacked_llama() -> dict[str, Parameter]:
    """The parameters as a server that stacks q, k, v and gate, up holds them, put together by hand."""
    held = list(LLAMA.values())
    return {
        "model.embed_tokens.weight": parameter(held[0]),
        "model.layers.0.self_attn.qkv_proj.weight": parameter(np.concatenate(held[1:4])),
        "model.layers.0.mlp.gate_up_proj.weight": parameter(np.concatenate([held[5], held[4]])),
        "model.layers.0.self_attn.attn.k_scale": parameter(np.ones((), np.float32)),
    }


def test_every_byte_in_its_place(tmp_path: Path) -> None:
    found = placement.compare(write_model(tmp_path / "m", LLAMA), stacked_llama(), VLLM)
    assert (found.tensors, found.bytes, found.wrong) == (6, sum(v.nbytes for v in LLAMA.values()), ())


def test_a_swapped_stack_a_lost_tensor_and_a_leftover_are_seen(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", LLAMA)
    swapped = stacked_llama()
    gate_up = "model.layers.0.mlp.gate_up_proj.weight"
    swapped[gate_up] = parameter(np.concatenate([list(LLAMA.values())[4], list(LLAMA.values())[5]]))
    assert placement.compare(folder, swapped, VLLM).wrong[0].endswith(f"of 96 bytes differ in {gate_up}")
    lost = {name: held for name, held in stacked_llama().items() if name != gate_up}
    assert placement.compare(folder, lost, VLLM).wrong == (f"no parameter {gate_up}",)
    leftover = stacked_llama() | {"model.norm.weight": parameter(bf16([1]))}
    assert placement.compare(folder, leftover, VLLM).wrong == ("nothing was loaded into model.norm.weight",)


@pytest.mark.parametrize(("names", "embedding"), [(VLLM, "model.embedding"), (SGLANG, "model.embed_tokens")])
def test_experts_of_gpt_oss_lie_turned(tmp_path: Path, names: Names, embedding: str) -> None:
    embed, gate_up, bias = GPT_OSS.values()
    loaded = {
        f"{embedding}.weight": parameter(embed),
        f"model.layers.0.mlp{names.experts}w13_weight": parameter(gate_up.swapaxes(1, 2)),
        f"model.layers.0.mlp{names.experts}w13_{names.biases}": parameter(bias.astype(np.float32)),
    }
    folder = write_model(tmp_path / "m", GPT_OSS)
    assert placement.compare(folder, loaded, names).wrong == ()
    loaded[f"model.layers.0.mlp{names.experts}w13_weight"] = parameter(gate_up)
    assert len(placement.compare(folder, loaded, names).wrong) == 1


def test_an_expert_a_module_stacks_expert_first_gate_before_up(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.routed_experts.w13_weight_scale_2"
    folder = write_model(tmp_path / "m", EXPERTS)
    loaded = {name: parameter(np.array([[1, 2], [3, 4]], np.float32))}
    assert placement.compare(folder, loaded, VLLM).wrong == ()
    loaded = {name: parameter(np.array([[1, 3], [2, 4]], np.float32))}
    assert len(placement.compare(folder, loaded, VLLM).wrong) == 1


def test_what_a_server_raises_or_dies_of_is_the_answer() -> None:
    def fails() -> int:
        raise KeyError("w13_bias")

    def dies() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 1

    assert isolated(lambda: 7, "numpy") == Answer(7)
    assert isolated(fails, "numpy").error == "KeyError: 'w13_bias'"
    assert "SIGKILL" in isolated(dies, "numpy").error


def test_what_vllm_makes_of_a_fault_is_told_apart() -> None:
    healthy = Outcome(tokens=((1, 2),), logprobs=((-1.0, -2.0),), parameters={"p": Parameter("uint8", (1,), b"a")})
    damaged = {"p": Parameter("uint8", (1,), b"b")}
    kinds = {
        "refuses": Outcome(error="KeyError: 'x'"),
        "silent": Outcome(tokens=((1, 3),), logprobs=((-1.0, -2.0),), parameters=damaged),
        "hidden": Outcome(tokens=((1, 2),), logprobs=((-1.0, -2.0),), parameters=damaged),
        "harmless": healthy,
    }
    assert {kind: vllm_faults.reaction(healthy, outcome).kind for kind, outcome in kinds.items()} == {
        kind: kind for kind in kinds
    }
    nan = Outcome(tokens=((1, 2),), logprobs=((-1.0, float("nan")),))
    assert "NaN" in vllm_faults.reaction(healthy, nan).words


@pytest.mark.parametrize("words", [[], ["gguf"], ["gguf", "vllm"]])
def test_parts_are_named_or_all_of_them_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["servers", *words])
    assert list(command.arguments().parts) == words


def test_a_part_that_is_not_there_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["servers", "trtllm"])
    with pytest.raises(SystemExit):
        command.arguments()
    assert "choose from gguf, sglang, vllm, faults" in capsys.readouterr().err


def test_every_planted_fault_is_fed_to_vllm_and_told_in_the_docs() -> None:
    assert set(vllm_faults.EXPECTED) == {fault.name for fault in FAULTS}
    for fault in FAULTS:
        assert f"| {fault.name} | {fault.base} |" in DOC


def test_the_docs_have_every_check_that_is_run_and_none_that_failed() -> None:
    for pair in vllm_checks.PAIRS:
        assert f"generation: {pair.what} |" in DOC
    for name in (*vllm_checks.LOADS, *sglang_checks.LOADS):
        assert f"load_weights of our {name} |" in DOC
    assert "**FAILS**" not in DOC
