"""Hand a checkpoint to SGLang's own code as far as it runs without a GPU: its arguments, its config parsers, its choice
of layers, its models and their `load_weights`. No kernel runs, so nothing is generated.

Two things are made up: torchvision (which SGLang imports and which needs a build of torch of its own), and the answer
to which GPU is there, since SGLang refuses NVFP4 on others than Blackwell before it reads a tensor.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

from servers_checks.isolated import isolated
from servers_checks.placement import Parameter, fill, snapshot

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "SGLANG_LOG_LEVEL": "error",
}
_MADE_UP = ("torchvision",)
_CAPABILITY = (10, 0)  # Blackwell


@dataclass(frozen=True)
class Loaded:
    """What SGLang did with one checkpoint: the error it raised, or its reader of configs and its parameters' bytes."""

    error: str = ""
    where: str = ""
    reader: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that take any attribute, for packages that are imported and not used here."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] in _MADE_UP:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _MadeUp(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class _MadeUp(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def prepare() -> str:
    """Import SGLang; its version."""
    os.environ.update(_SETTINGS)
    _settle_transformers()
    sys.meta_path.append(_Modules())
    warnings.simplefilter("ignore")
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.models import registry
    from sglang.version import __version__

    torch.cuda.get_device_capability = lambda *args: _CAPABILITY
    runtime_context.override_platform(is_blackwell=True).__enter__()
    quantization.QUANTIZATION_METHODS["mxfp4"] = Mxfp4Config  # there on GPUs
    registry.ModelRegistry.get_supported_archs()  # imports every model once, for all that follow
    return str(__version__)


def load(folder: Path) -> Loaded:
    """Build the model that SGLang would, with its parameters filled with a pattern, and let it load `folder`."""
    answer = isolated(partial(_load, folder), "sglang")
    return answer.value or Loaded(answer.error.replace(f"{folder.parent}/", ""), answer.where)


def _settle_transformers() -> None:
    """Let transformers find out what is installed before anything is made up."""
    from transformers.utils import import_utils

    for name in dir(import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            with suppress(Exception):
                getattr(import_utils, name)()


def _load(folder: Path) -> Loaded:
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import ServerArgs

    os.environ["MASTER_PORT"] = "0"
    arguments = ServerArgs(model_path=str(folder), device="cpu", dtype="bfloat16", skip_tokenizer_init=True)
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))
    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    config = ModelConfig.from_server_args(arguments)
    reading = loader.DefaultModelLoader(LoadConfig())
    quantisation = loader._get_quantization_config(config, reading.load_config)
    with loader.set_default_torch_dtype(config.dtype), torch.device("cpu"):
        model = loader._initialize_model(config, reading.load_config, quantisation)
    for name, parameter in model.named_parameters():
        fill(name, parameter.data)
    model.load_weights(reading._get_all_weights(config, model))
    return Loaded(reader=type(quantisation).__name__ if quantisation else "none", parameters=snapshot(model))
