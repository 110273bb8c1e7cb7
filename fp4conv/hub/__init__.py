"""The Hugging Face Hub: names of repositories, what is asked of the Hub, and what its refusals mean.

Owns every request, made through huggingface_hub, which brings its cache, login, HF_ENDPOINT and HF_HUB_OFFLINE along.
It refuses to own which files make a checkpoint (`sources/`). huggingface_hub is imported where it is called: a third
of a second that local conversions do not pay.
"""

from __future__ import annotations
