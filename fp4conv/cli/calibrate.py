"""`fp4conv calibrate`: input scales, and those of an FP8 KV cache, without training."""

from __future__ import annotations

import shlex

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, quiet_option
from fp4conv.cli.output import print_json


@click.command(
    short_help="Measure input scales (W4A4) for convert.",
    epilog=epilog("fp4conv calibrate my-llama --dataset chats.jsonl --output amax.safetensors"),
)
@click.argument("model", metavar="MODEL")
@click.option(
    "--dataset", required=True, metavar="DATA",
    help="JSONL, parquet, a folder of them, or a Hub id, org/name[@revision]; with messages, prompt/completion or "
    "text.",
)  # fmt: skip
@click.option("--output", required=True, metavar="FILE", help="The safetensors file to write.")
@click.option("--calib-samples", type=click.IntRange(min=1), default=128, help="The first so many examples [128].")
@click.option("--max-length", type=click.IntRange(min=1), default=2048, help="Longest example in tokens [2048].")
@click.option("--train-split", default="train", help="Split of the dataset, or file stem [train].")
@click.option("--subset", help="Subset of a Hub dataset.")
@click.option("--kv-cache", is_flag=True, help="k_amax and v_amax too: the conversion then has an FP8 KV cache.")
@click.option("--attn-implementation", metavar="NAME", help="eager, sdpa, ... Default: eager for gpt-oss.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
@quiet_option
@json_option
def calibrate(model: str, **options: object) -> None:
    """Run MODEL over examples, and write the largest magnitudes of its inputs to FILE.

    fp4conv convert MODEL DST --to nvfp4 --input-scales FILE makes activation scales (W4A4) of them. Nothing is trained,
    and MODEL stays as it is. Needs: pip install 'fp4conv[qat]'.
    """
    run(model, **options)  # type: ignore[arg-type]


def run(model: str, *, quiet: bool, as_json: bool, **options: object) -> None:
    from tqdm import tqdm

    from fp4conv.commands.calibrate import calibrate as command

    with tqdm(desc="calibrate", unit=" examples", disable=True if quiet else None) as bar:

        def tell(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        result = command(model, tell=tell, **options)  # type: ignore[arg-type]
    if as_json:
        print_json(result.to_json())
        return
    for name, commit in result.commits.items():
        click.echo(f"of {name}: commit {commit}")
    kv = f" and {result.kv} of the KV cache" if result.kv else ""
    click.echo(
        f"{result.output}: the amax of {result.inputs} inputs{kv}, over {result.samples} examples with "
        f"{result.tokens:,} tokens, in {result.seconds:.1f} s\n"
        f"next: {shlex.join(['fp4conv', 'convert', model, 'DST', '--to', 'nvfp4', '--input-scales', result.output])}"
    )
