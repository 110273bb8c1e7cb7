"""The command line against its contract: streams, exit codes, JSON keys, examples that run, a quick --help."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from checkpoints import noise, read_raw, tree, write_model
from click.testing import CliRunner, Result
from hub_server import Hub

import fp4conv
from fp4conv.cli import main

Reference = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
CONVERT_KEYS = {
    *("source", "destination", "format", "layout", "tensors", "bytes_read", "bytes_written", "seconds"),
    *("peak_rss_bytes", "lossy_blocks", "sqnr_db", "per_tensor", "servers", "warnings"),
}
INSPECT_KEYS = {"format", "family", "parameters", "bytes", "bits_per_weight", "tensors"}
TENSOR_KEYS = {"name", "format", "shape", "bytes"}


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def json_of(*arguments: str | Path) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def module(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m fp4conv ARGUMENTS`, or a piece of code."""
    words = ["-c", code] if code else ["-m", "fp4conv"]
    command = [sys.executable, *words, *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---- help


def test_python_m() -> None:
    shown = module("--help")
    assert shown.returncode == 0
    assert {"convert", "inspect", "demo"} <= set(shown.stdout.split())
    assert module("--version").stdout.strip() == f"fp4conv, version {fp4conv.__version__}"
    assert module().returncode == 2
    assert module("convert").returncode == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["inspect", "-h"], ["demo", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from fp4conv.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'numba', 'numpy', 'torch', 'rich', 'ml_dtypes', 'tqdm', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = module(*arguments, code=code)
    assert shown.returncode == 0, shown.stderr


def examples() -> list[str]:
    """The lines after 'Example:' in the help of every command."""
    found = []
    for name in main.commands:
        shown = CliRunner().invoke(main, [name, "--help"], terminal_width=200).stdout
        assert "Example" in shown, f"{name} --help ends with an example"
        found += re.findall(r"^ *(fp4conv .*)$", shown.split("Example", 1)[1], re.MULTILINE)
    return found


def test_help_has_a_whole_sentence_a_command_in_the_order_of_the_work() -> None:
    lines = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == list(main.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_every_command_has_examples() -> None:
    assert {shlex.split(line)[1] for line in examples()} == set(main.commands)
    assert all(len(line) < 90 for line in examples())


@pytest.mark.parametrize("line", [line for line in examples() if not {"demo", "--dataset"} & set(line.split())])
def test_examples_run(
    hub: Hub, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.users["hf_owner"] = "my-org"
    hub.add("openai/gpt-oss-20b", reference("gptoss-mxfp4"))
    (tmp_path / "gpt-oss-20b").symlink_to(reference("gptoss-mxfp4"))
    (tmp_path / "my-llama").symlink_to(reference("llama-bf16"))
    (tmp_path / "my-llama-fp4").symlink_to(reference("llama-nvfp4-default"))
    (tmp_path / "my-gpt-oss-lora").symlink_to(reference("gptoss-lora-qat"))
    (tmp_path / "my-llama-lora").symlink_to(reference("lora-variants/llama-patterns/adapter"))
    result = run(*shlex.split(line)[1:])
    assert result.exit_code == 0, result.stderr
    assert result.stdout


def test_demo(tmp_path: Path) -> None:
    shown = run("demo", tmp_path / "the demo")
    assert shown.exit_code == 0, shown.stderr
    assert f"fp4conv inspect '{tmp_path}/the demo/nvfp4'" in shown.stdout
    assert "SQNR" in shown.stdout
    assert shown.stdout.count("all equal") == 2, "MXFP4 -> NVFP4 and MXFP4 -> BF16 lose nothing"
    assert {path.name for path in (tmp_path / "the demo").iterdir()} == {"bf16", "mxfp4", "nvfp4", "bf16-again"}
    again = run("demo", tmp_path / "the demo")
    assert again.exit_code == 1
    assert str(tmp_path / "the demo") in again.stderr


def test_demo_writes_into_no_folder_that_has_something(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder in ("docs", "file"):
        shown = run("demo", tmp_path / folder)
        assert shown.exit_code == 1
        assert "not an empty folder" in shown.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["docs", "file", "thesis.txt"]


# ---- streams and JSON


def test_json_of_convert(reference: Reference, tmp_path: Path) -> None:
    found = json_of("convert", reference("gptoss-bf16"), tmp_path / "dst", "--to", "nvfp4")
    assert set(found) >= CONVERT_KEYS
    counts = found["tensors"]
    assert isinstance(counts, dict)
    assert set(counts) == {"converted", "copied", "merged"}
    assert counts["merged"] == 0
    assert counts["converted"] + counts["copied"] == len(read_raw(reference("gptoss-bf16")))
    per_tensor = found["per_tensor"]
    assert isinstance(per_tensor, dict)
    assert len(per_tensor) == counts["converted"]
    assert found["source"] == str(reference("gptoss-bf16"))
    assert found["destination"] == str(tmp_path / "dst")
    assert found["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "dst").iterdir())
    servers = found["servers"]
    assert isinstance(servers, list)
    assert {server["server"] for server in servers} == {"vllm", "sglang", "trtllm", "transformers", "llamacpp"}


def test_sqnr_is_null_when_nothing_is_lost(reference: Reference, tmp_path: Path) -> None:
    found = json_of("convert", reference("gptoss-mxfp4"), tmp_path / "a", "--to", "nvfp4")
    assert found["sqnr_db"] is None
    assert found["lossy_blocks"] == 0
    assert json_of("convert", reference("gptoss-mxfp4"), tmp_path / "b", "--to", "bf16")["sqnr_db"] is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptoss-bf16", ["--to", "mxfp4"]),
        ("gptoss-bf16", ["--to", "nvfp4", "--modules", "all", "--max-shard-size", "100KB"]),
        ("gptoss-mxfp4", ["--to", "nvfp4", "--input-scales", "constant"]),
        ("llama-nvfp4-weight-only", ["--to", "nvfp4"]),
        ("llama-bf16", ["--to", "f32"]),
    ],
)
def test_dry_run_writes_nothing_and_foretells_the_sizes(
    reference: Reference, tmp_path: Path, name: str, options: list[str]
) -> None:
    arguments: tuple[str | Path, ...] = ("convert", reference(name), tmp_path / "dst", *options)
    before = tree(reference(name))
    planned = json_of(*arguments, "--dry-run")
    text = run(*arguments, "--dry-run")
    assert text.exit_code == 0
    for word in ("writes", "reads", "disk", "free", "memory", "shard", "tensors"):
        assert word in text.stdout
    assert list(tmp_path.iterdir()) == []
    assert tree(reference(name)) == before
    done = json_of(*arguments)
    for key in ("bytes_written", "bytes_read", "tensors", "layout", "format", "servers", "warnings"):
        assert planned[key] == done[key], key
    foretold = ("shards", "disk_needed_bytes", "disk_free_bytes", "memory_bound_bytes")
    assert set(planned) == {*done, *foretold, "download"}
    shards = {path.name: path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors")}
    assert planned["shards"] == [{"file": file, "bytes": nbytes} for file, nbytes in sorted(shards.items())]
    needed, free, bound = (planned[key] for key in foretold[1:])
    assert isinstance(needed, int)
    assert needed >= sum(path.stat().st_size for path in (tmp_path / "dst").rglob("*") if path.is_file())
    assert isinstance(free, int)
    assert abs(free - shutil.disk_usage(tmp_path).free) < 10**9
    assert isinstance(bound, int)
    assert 10**8 < bound <= 10**9, "--max-memory is 1GB"
    assert planned["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "dst").iterdir())


def test_json_of_inspect(reference: Reference) -> None:
    found = json_of("inspect", reference("qwen3moe-nvfp4-default"), "--headers-only")
    assert set(found) >= INSPECT_KEYS
    tensors = found["tensors"]
    assert isinstance(tensors, list)
    assert len(tensors) == len(fp4conv.open(reference("qwen3moe-nvfp4-default")).names)
    assert all(set(tensor) >= TENSOR_KEYS for tensor in tensors)
    assert run("inspect", reference("llama-bf16"), "--tensor", "*nothing*").exit_code == 2
    for order in ("name", "format", "bytes", "bits"):
        assert run("inspect", reference("llama-bf16"), "--sort", order).exit_code == 0


def test_streams(reference: Reference, tmp_path: Path) -> None:
    """Results on stdout, warnings on stderr; --quiet leaves the warnings out, --json has them inside."""
    source = reference("llama-nvfp4-default")
    loud = run("convert", source, tmp_path / "a", "--to", "bf16")
    assert "warning: the input scales" in loud.stderr
    assert "warning" not in loud.stdout
    assert "written" in loud.stdout
    quiet = run("convert", source, tmp_path / "b", "--to", "bf16", "--quiet")
    assert quiet.stderr == ""
    found = json_of("convert", source, tmp_path / "c", "--to", "bf16", "--quiet")
    assert any("input scales" in str(warning) for warning in found["warnings"])  # type: ignore[attr-defined]
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_options_are_those_of_the_function(reference: Reference, tmp_path: Path) -> None:
    arguments: Mapping[str, object] = {
        "modules": "mlp",
        "exclude": ["*layers.1*"],
        "scale_rule": "four-over-six",
        "ties": "down",
        "input_scales": "constant",
        "max_shard_size": "90KB",
        "workers": 3,
        "max_memory": "500MB",
    }
    words = ["--modules", "mlp", "--exclude", "*layers.1*", "--scale-rule", "four-over-six", "--ties", "down"]
    words += ["--input-scales", "constant", "--max-shard-size", "90KB", "--workers", "3", "--max-memory", "500MB"]
    source = reference("llama-bf16")
    assert run("convert", source, tmp_path / "a", "--to", "nvfp4", *words).exit_code == 0
    fp4conv.convert(source, tmp_path / "b", to="nvfp4", **arguments)  # type: ignore[arg-type]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    plain = fp4conv.convert(source, tmp_path / "c", to="nvfp4")
    assert tree(tmp_path / "a") != tree(tmp_path / "c")
    assert plain.format == "nvfp4"


def test_for_a_server_that_loads_it(reference: Reference, tmp_path: Path) -> None:
    assert run("convert", reference("gptoss-bf16"), tmp_path / "a", "--to", "mxfp4", "--for", "vllm").exit_code == 0


def test_overwrite(reference: Reference, tmp_path: Path) -> None:
    arguments = ("convert", reference("llama-bf16"), tmp_path / "dst", "--to", "mxfp4")
    assert run(*arguments).exit_code == 0
    before = tree(tmp_path)
    assert run(*arguments).exit_code == 1
    assert tree(tmp_path) == before
    (tmp_path / "dst" / "stray").write_text("x")
    assert run(*arguments, "--overwrite").exit_code == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a [b] c", "x[red]y", "[bold", ":smile:", "ünïcode", "-dash"])
def test_names_are_printed_as_they_are(tmp_path: Path, name: str) -> None:
    source = write_model(
        tmp_path / name, {"model.layers.0.mlp.down_proj.weight": noise((8, 32)), "odd [/x] [red]t": noise((4,))}
    )
    for command in (("inspect", source), ("convert", source, tmp_path / "dst", "--to", "nvfp4", "--dry-run")):
        shown = run(*command)
        assert shown.exit_code == 0
        assert name in re.sub(r"\s*\n\s*", "", shown.stdout)
    assert "odd [/x] [red]t" in run("inspect", source).stdout
    assert run("convert", source, tmp_path / "dst", "--to", "nvfp4").exit_code == 0


def test_a_closed_pipe_is_no_error(reference: Reference) -> None:
    words = shlex.join([sys.executable, "-m", "fp4conv", "inspect", str(reference("qwen3moe-bf16")), "--json"])
    shown = subprocess.run(f"{words} | head -c 10", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in shown.stderr
    assert len(shown.stdout) == 10
