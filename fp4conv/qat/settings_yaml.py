"""Settings as a YAML file with comments, and back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import yaml

from fp4conv.errors import UsageError
from fp4conv.qat.settings import Settings, checked, plain

SETTINGS_FILE = "qat.yaml"  # in the folder of a run: all its settings


def read_yaml(path: Path) -> dict[str, object]:
    """The settings of a YAML file, unchecked but for their names. UsageError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        found: object = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        raise UsageError(f"is not YAML: {error}", where=str(path)) from error
    except ValueError as error:  # of a date that no calendar has
        raise UsageError(f"holds what YAML cannot read: {error}", where=str(path)) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError("holds no settings", where=str(path), hint="write `key: value` lines; see --print-config")
    keys = [str(key.value) for key, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UsageError(f"says {twice} more than once", where=str(path), hint="keep one of the lines")
    return {str(key): checked(str(key), value, str(path)) for key, value in found.items()}


def to_yaml(settings: Settings) -> str:
    """`settings` as a YAML file with a comment to each, which `read_yaml` reads back."""
    lines = ["# Settings of `fp4conv qat`. Each is an option too: --sft-learning-rate 1e-5."]
    section = ""
    for one in fields(settings):
        if one.metadata["section"] != section:
            section = one.metadata["section"]
            lines += ["", f"# {section}"]
        choices = f" ({', '.join(one.metadata['choices'])})" if one.metadata["choices"] else ""
        lines.append(f"{one.name}: {_yaml_value(getattr(settings, one.name))}  # {one.metadata['help']}{choices}")
    return "\n".join(lines) + "\n"


def _yaml_value(value: object) -> str:
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes 2e-05 for a string: it wants a point in the mantissa.
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    return str(yaml.safe_dump(plain(value), default_flow_style=True, width=10_000)).removesuffix("...\n").strip()
