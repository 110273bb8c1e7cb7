"""Hand a checkpoint to vLLM, in a process of its own, and tell what it did.

Only what has to be watched is wrapped: the parameters' bytes are taken after loading, before any kernel rearranges
them, and where it is asked whether all of them were loaded they hold a pattern before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from servers_checks.isolated import isolated
from servers_checks.placement import Parameter, fill, is_optional, snapshot

PROMPTS = ((1, 5, 9, 77), (3, 2, 100), (200, 201, 202, 203, 204, 205, 17))
TOKENS = 24
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

Tokens = tuple[tuple[int, ...], ...]
LogProbs = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What vLLM did with one checkpoint.

    `error` is empty where nothing was raised. `tokens` and `logprobs` have one row a prompt. `parameters` are the
    model's bytes as `load_weights` left them.
    """

    error: str = ""
    where: str = ""
    tokens: Tokens = ()
    logprobs: LogProbs = ()
    parameters: dict[str, Parameter] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def prepare() -> str:
    """Import vLLM with the kernels that a CPU lacks; its version."""
    os.environ.update(_SETTINGS)
    import vllm

    from servers_checks import vllm_kernels

    vllm_kernels.register()
    return str(vllm.__version__)


def generate(folder: Path) -> Outcome:
    """Load `folder` and generate greedily from `PROMPTS`. Whatever vLLM raises is part of the outcome."""
    return _serve(_generate, folder)


def load(folder: Path) -> Outcome:
    """Load `folder` into parameters that hold a pattern, and go no further. `parameters` is what they hold then."""
    return _serve(_load, folder)


def _serve(function: Callable[[Path], Outcome], folder: Path) -> Outcome:
    answer = isolated(partial(function, folder), "vllm")
    return answer.value or Outcome(answer.error.replace(f"{folder.parent}/", ""), answer.where)


class _LoadedError(Exception):
    """Ends a load that goes no further."""


def _load(folder: Path) -> Outcome:
    parameters = _watch(stop=True)
    try:
        _engine(folder)
    except _LoadedError:
        return Outcome(parameters=parameters)
    raise AssertionError("vLLM built its engine without loading a model")


def _generate(folder: Path) -> Outcome:
    from vllm import SamplingParams

    warned = _Warnings()
    logging.getLogger("vllm").addHandler(warned)
    parameters = _watch(stop=False)
    engine = _engine(folder)
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    answers = [answer.outputs[0] for answer in engine.generate(prompts, wanted, use_tqdm=False)]
    return Outcome(
        tokens=tuple(tuple(answer.token_ids) for answer in answers),
        logprobs=tuple(_logprobs(answer.token_ids, answer.logprobs) for answer in answers),
        parameters=parameters,
        warnings=tuple(warned.lines),
    )


def _logprobs(tokens: Sequence[int], steps: Sequence) -> tuple[float, ...]:  # type: ignore[type-arg]
    return tuple(float(step[token].logprob) for token, step in zip(tokens, steps, strict=True))


def _engine(folder: Path):  # type: ignore[no-untyped-def]
    from vllm import LLM

    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        disable_log_stats=True,
    )


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _watch(*, stop: bool) -> dict[str, Parameter]:
    """A dictionary that gets what the parameters hold after loading. With `stop` they are filled before it."""
    from vllm.model_executor.model_loader import base_loader

    initialize, process = base_loader.initialize_model, base_loader.process_weights_after_loading
    parameters: dict[str, Parameter] = {}

    def initialize_and_fill(*args: object, **kwargs: object) -> object:
        model = initialize(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if stop and not is_optional(name):
                fill(name, parameter.data)
        return model

    def note_and_process(model, *args: object) -> object:  # type: ignore[no-untyped-def]
        parameters.update(snapshot(model))
        if stop:
            raise _LoadedError
        return process(model, *args)

    base_loader.initialize_model = initialize_and_fill
    base_loader.process_weights_after_loading = note_and_process
    return parameters
