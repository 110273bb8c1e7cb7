"""The rows of the table at the end: which model each is, and how it is loaded.

A four-bit checkpoint is evaluated as transformers reads it: MXFP4 of gpt-oss directly, any other by way of
`fp4conv convert` to the dtype of training. Where training quantised inputs too, the model with decoded weights runs
under the same input quantisers.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp4conv.commands.convert import convert
from fp4conv.families import Role
from fp4conv.formats import BLOCK_FORMATS, MXFP4
from fp4conv.model import JSON
from fp4conv.qat.checks import check_dense, check_exported
from fp4conv.qat.converting import going_on, threads
from fp4conv.qat.data import held_out
from fp4conv.qat.evaluate import Score, batches, evaluate
from fp4conv.qat.in_force import bake
from fp4conv.qat.models import free, load_model, load_tokenizer, parsed
from fp4conv.qat.quantising import backend_of
from fp4conv.qat.steps import Places, Selected, dense_format, quantise, selection

if TYPE_CHECKING:
    import transformers

    from fp4conv.qat.settings import Settings

ORIGINAL, SFT, QAT, EXPORTED = "original", "sft", "sft + qat", "exported"


def ptq_row(format_name: str) -> str:
    return f"sft + ptq {format_name}"


def rows_of(settings: Settings, *, trained: bool) -> tuple[str, ...]:
    """The rows of a run, in order. `trained`: it had a QAT step."""
    first = "qat" if "sft" in settings.skip else QAT
    rows = [ORIGINAL]
    if "sft" not in settings.skip:
        rows += [SFT, *map(ptq_row, sorted(BLOCK_FORMATS))]
    else:
        rows += [ptq_row(name).removeprefix("sft + ") for name in sorted(BLOCK_FORMATS)]
    if trained:
        rows.append(first)
    if "export" not in settings.skip:
        rows.append(EXPORTED)
    return tuple(rows)


@dataclass(frozen=True)
class Comparison:
    """The export beside the fake-quantised model. `values`: decoded weights that were compared; equal but for `notes`.

    `logits`: compared, inputs unquantised; `largest`: their largest difference, `quantized_inputs`: the same with
    input quantisers on both sides, None where training had none.
    """

    values: int
    notes: tuple[str, ...]
    logits: int
    largest: float
    quantized_inputs: float | None

    def to_json(self) -> dict[str, JSON]:
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Scoring:
    """What the rows are made from: `base` (dense, as given), `tuned` (dense, what QAT starts from), and the rest."""

    base: Path
    tuned: Path
    places: Places
    settings: Settings
    names: tuple[str, ...]

    def score(self, row: str) -> Score:
        """Evaluate the model of one row."""
        if row == ORIGINAL:
            return self._evaluate(load_model(self.base, self.settings))
        if row == SFT:
            return self._evaluate(load_model(self.tuned, self.settings))
        if row == EXPORTED:
            return self._evaluate(self.exported())
        for name in BLOCK_FORMATS:
            if row.endswith(f"ptq {name}"):
                return self._evaluate(self._ptq(name))
        return self._evaluate(self._baked())

    def compare(self) -> Comparison:
        """The export's decoded weights are the fake-quantised ones (or ValuesError), and logits beside each other."""
        backend, settings = backend_of(self.settings), self.settings
        model = self._fake_quantised()
        report = check_exported(backend.quantized(model), self.places.export)
        check_dense(self.places.export, self.places.qat / "model")
        backend.set_inputs(model, False)
        plain = self._logits(model)
        backend.set_inputs(model, True)
        under_inputs = self._logits(model)
        del model
        free()
        model = self.exported(inputs=False)
        largest = _largest(plain, self._logits(model))
        del model
        free()
        quantized_inputs = None
        if not torch.equal(plain, under_inputs):
            quantized_inputs = _largest(under_inputs, self._logits(self.exported()))
            free()
        assert settings.format is not None
        return Comparison(report.values, tuple(report.notes), plain.numel(), largest, quantized_inputs)

    def exported(self, *, inputs: bool = True) -> transformers.PreTrainedModel:
        """The exported checkpoint, loaded again; with `inputs` under the input quantisers of its training, if any."""
        model = self._loaded_again(self.places.export)
        if inputs:
            self._put_inputs(model)
        return model

    def _fake_quantised(self) -> transformers.PreTrainedModel:
        model = load_model(self.places.qat / "model", self.settings)
        backend_of(self.settings).load(model, self.places.quantizers)
        return model.eval()

    def _baked(self) -> transformers.PreTrainedModel:
        """The same with the values of the forward pass in place of the masters: they need not be made at each token."""
        model = self._fake_quantised()
        bake(model, backend_of(self.settings))
        return model

    def _ptq(self, name: str) -> transformers.PreTrainedModel:
        out = self.places.ptq / name
        quantise(self.tuned, out, name, self.settings, chosen=self._selected(name))
        model = self._loaded_again(out)
        shutil.rmtree(self.places.ptq)
        if name == self.settings.format:
            self._put_inputs(model)
        return model

    def _selected(self, name: str) -> Selected:
        """What training quantised, or as much of it as a checkpoint of the other format can hold."""
        model = parsed(self.tuned)
        chosen = selection(model, self.names)
        if name == MXFP4.name and model.family.scope == "experts":
            experts = {weight.module for weight in model.weights if weight.role is Role.EXPERT}
            return Selected(
                tuple(m for m in chosen.taken if m in experts), (*chosen.left, *set(chosen.taken) - experts)
            )
        return chosen

    def _put_inputs(self, model: transformers.PreTrainedModel) -> None:
        backend = backend_of(self.settings)
        backend.load(model, self.places.quantizers)
        backend.set_weights(model, False)

    def _loaded_again(self, folder: Path) -> transformers.PreTrainedModel:
        found = parsed(folder)
        if found.format_name == MXFP4.name and found.layout == "openai":
            return load_model(folder, self.settings)
        dense = folder.with_name(f"{folder.name}-dense")
        convert(
            folder,
            dense,
            to=dense_format(self.settings),
            hints=False,
            max_memory=self.settings.max_memory,
            workers=threads(found, self.settings, merges=False),
            command=going_on(self.settings),
            overwrite=True,
        )
        model = load_model(dense, self.settings)
        shutil.rmtree(dense)
        return model

    def _evaluate(self, model: transformers.PreTrainedModel) -> Score:
        tokenizer = load_tokenizer(self.tuned)
        score = evaluate(model, tokenizer, held_out(self.settings, tokenizer), self.settings)
        del model
        free()
        return score

    def _logits(self, model: transformers.PreTrainedModel) -> torch.Tensor:
        """Logits of the first held-out batch, [B, T, V], on the processor."""
        tokenizer = load_tokenizer(self.tuned)
        test = held_out(self.settings, tokenizer)[: self.settings.eval_batch_size]
        batch = next(batches(test, self.settings.eval_batch_size, tokenizer.pad_token_id, model.device))
        with torch.inference_mode():
            out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found: torch.Tensor = out.logits.float().cpu()
        return found


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
