"""peft's LoRA adapters: what their files say, as deltas on the weights of a model.

`config` is adapter_config.json, `names` the spelling of tensors, `experts` the packing of expert parameters,
`merge` puts deltas on a model. Nothing here reads a tensor: names, shapes and one small config decide.
"""

from __future__ import annotations

from fp4conv.lora.merge import is_trained, merge

__all__ = ["is_trained", "merge"]
