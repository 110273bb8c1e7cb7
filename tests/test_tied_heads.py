"""A stored output head beside embeddings to which config.json ties it: copies are fine, others are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, array_of, bf16, config_of, noise, read_raw, write_model

import fp4conv
from fp4conv.checks.check import check_structure
from fp4conv.checks.own import tied_head_warnings
from fp4conv.checks.survey import survey
from fp4conv.report.verified import Verified
from fp4conv.servers import VERSIONS

Reference = Callable[[str], Path]
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
KIND = "tied-head-differs"


def model(
    reference: Reference, folder: Path, changes: Mapping[str, Array], tied: object = True, **config: object
) -> Path:
    source = reference("llama-bf16")
    tensors = {name: array_of(raw) for name, raw in read_raw(source).items()}
    stated = {} if tied is None else {"tie_word_embeddings": tied}
    held = {key: value for key, value in config_of(source).items() if key != "tie_word_embeddings"}
    return write_model(folder, {**tensors, **changes}, {**held, **stated, **config})


def table(reference: Reference) -> Array:
    return array_of(read_raw(reference("llama-bf16"))[TABLE])


def found(result: Verified) -> str | None:
    """What is said of the head; None where nothing is."""
    return next((problem.found for problem in result.problems if problem.kind == KIND), None)


def test_a_head_of_its_own_is_told_with_what_servers_make_of_it(reference: Reference, tmp_path: Path) -> None:
    folder = model(reference, tmp_path / "model", {})
    raw = read_raw(folder)
    head, held = (array_of(raw[name]).astype(np.float64) for name in (HEAD, TABLE))
    result = fp4conv.verify(folder)
    assert not result.ok
    differing, largest = int((head != held).sum()), float(np.abs(head - held).max())
    said = f"{differing:,} of {head.size:,} values differ from those of {TABLE}, by {largest:.3g} at most"
    assert found(result) == said
    problem = next(problem for problem in result.problems if problem.kind == KIND)
    outcomes = {each.server: each.outcome for each in problem.readings}
    assert outcomes == {"vllm": "loads", "sglang": "silent-damage", "transformers": "loads", "llamacpp": "loads"}
    assert "tie_word_embeddings false" in problem.remedy
    assert fp4conv.verify(folder, for_server="vllm").ok
    assert not fp4conv.verify(folder, for_server="sglang").ok


def test_what_transformers_makes_of_it(reference: Reference, tmp_path: Path) -> None:
    """The pinned release itself: both tensors as they are stored, and one tensor where they are equal."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != VERSIONS["transformers"]:
        pytest.skip(f"the rules are of transformers {VERSIONS['transformers']}")
    for name, changes in (("apart", {}), ("equal", {HEAD: table(reference)})):
        folder = model(reference, tmp_path / name, changes)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        raw = read_raw(folder)
        for module, tensor in ((loaded.get_output_embeddings(), HEAD), (loaded.get_input_embeddings(), TABLE)):
            assert (module.weight.float().detach().numpy() == array_of(raw[tensor]).astype(np.float32)).all()
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied is (name == "equal")


def test_copies_of_the_embeddings_are_fine(reference: Reference, tmp_path: Path) -> None:
    held = table(reference)
    assert found(fp4conv.verify(model(reference, tmp_path / "copy", {HEAD: held}))) is None
    wide = {HEAD: held.astype(np.float32)}
    assert found(fp4conv.verify(model(reference, tmp_path / "wide", wide))) is None
    signed, nan = held.copy(), held.copy()
    signed.flat[0], nan.flat[:3] = -0.0, np.nan
    zero = held.copy()
    zero.flat[0] = 0.0
    assert found(fp4conv.verify(model(reference, tmp_path / "zero", {HEAD: signed, TABLE: zero}))) is None
    assert found(fp4conv.verify(model(reference, tmp_path / "nan", {HEAD: nan, TABLE: nan.astype(np.float32)}))) is None


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_twice_is_counted_twice(reference: Reference, tmp_path: Path, tied: bool) -> None:
    folder, held = model(reference, tmp_path / "model", {}, tied), table(reference)
    announced: list[int] = []
    read: list[int] = []
    result = fp4conv.verify(folder, on_start=announced.append, on_bytes=read.append)
    values = sum(array_of(raw).nbytes for raw in read_raw(folder).values())
    assert announced == [sum(read)] == [result.bytes_read] == [values + tied * 2 * held.nbytes]


def test_one_value_is_enough(reference: Reference, tmp_path: Path) -> None:
    """Also the last, which lies in the last chunk, and one that is not finite."""
    for value, said in ((-3.0, ""), (np.inf, "by inf at most")):
        head = table(reference).copy()
        head.flat[-1] = value
        told = found(fp4conv.verify(model(reference, tmp_path / str(value), {HEAD: head})))
        assert told is not None
        assert told.startswith("1 of ")
        assert said in told


def test_other_shapes_are_told(reference: Reference, tmp_path: Path) -> None:
    head = table(reference)[:-8]
    told = found(fp4conv.verify(model(reference, tmp_path / "short", {HEAD: head})))
    assert told == f"{list(head.shape)}, {TABLE} is {list(table(reference).shape)}"


@pytest.mark.parametrize(
    ("tied", "config", "told"),
    [
        (False, {}, False),
        (None, {}, False),
        (None, {"model_type": "gemma2"}, True),
        (False, {"model_type": "gemma2"}, False),
        (None, {"text_config": {"tie_word_embeddings": True}}, True),
        (False, {"text_config": {"tie_word_embeddings": True}}, False),
        ("yes", {}, False),
    ],
)
def test_who_ties_them(
    reference: Reference, tmp_path: Path, tied: object, config: dict[str, object], told: bool
) -> None:
    result = fp4conv.verify(model(reference, tmp_path / "model", {}, tied, **config))
    assert (found(result) is not None) is told


def test_a_conversion_says_it(reference: Reference, tmp_path: Path) -> None:
    apart = fp4conv.convert(model(reference, tmp_path / "apart", {}), tmp_path / "out", to="nvfp4")
    warning = next(warning for warning in apart.warnings if warning.startswith(HEAD))
    assert "differ" in warning
    assert "SGLang" in warning
    equal = model(reference, tmp_path / "equal", {HEAD: table(reference)})
    assert not [w for w in fp4conv.convert(equal, tmp_path / "out2", to="mxfp4").warnings if HEAD in w]


def test_a_head_quantised_beside_dense_embeddings_is_told(reference: Reference, tmp_path: Path) -> None:
    equal = model(reference, tmp_path / "equal", {HEAD: table(reference)})
    result = fp4conv.convert(equal, tmp_path / "out", to="nvfp4", include=["*"], exclude=["*embed_tokens"])
    assert any(f"in nvfp4, {TABLE} in bf16" in warning for warning in result.warnings)


def test_an_adapter_of_one_of_the_two_is_told(reference: Reference, tmp_path: Path) -> None:
    """It makes two of what was one."""
    equal = model(reference, tmp_path / "equal", {HEAD: table(reference)})
    rows, columns = table(reference).shape
    prefix = "base_model.model.model.embed_tokens."
    factors = {
        prefix + "lora_embedding_A": noise((4, rows), 1).astype(np.float32),
        prefix + "lora_embedding_B": noise((columns, 4), 2).astype(np.float32),
    }
    adapter = write_model(tmp_path / "adapter", factors)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]}'
    )
    result = fp4conv.merge_lora(equal, adapter, tmp_path / "out")
    assert any(warning.startswith(HEAD) and "differ" in warning for warning in result.warnings)


def test_what_is_gone_is_not_compared(reference: Reference, tmp_path: Path) -> None:
    """A stream sends shards away before the others are made."""
    tensors = {HEAD: bf16(np.ones((4, 4))), TABLE: bf16(np.ones((4, 4)))}
    config = {"model_type": "test", "tie_word_embeddings": True}
    folder = write_model(tmp_path / "model", tensors, config, shards=[[HEAD], [TABLE]])
    checked = check_structure(survey(folder, "model"))
    assert tied_head_warnings(checked, None, "model") == ()
    (folder / "model-00001-of-00002.safetensors").unlink()
    (warning,) = tied_head_warnings(checked, None, "model")
    assert "was not compared" in warning
