"""The verbs of `mcit` about data: what a model will see of them, ASD, verification."""

import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mcit.data_prep.errors import InputError

from .options import AsJson, Overrides, RecipeArgument, With, print_json


class Converter(StrEnum):
    """What `mcit asd` can convert with."""

    rules = "rules"
    llm = "llm"


class OnBad(StrEnum):
    """What becomes of a bad sample."""

    error = "error"
    drop = "drop"


def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    stage: Annotated[int, typer.Option(help="1 is the first.")] = 1,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of samples.")] = 5,
) -> None:
    """Show what the model will really see, and which tokens carry loss.

    Example: `mcit show mini/sefe --stage 2 -n 3`
    """
    from ..data_tools.show import show_stage
    from ..recipe.loading import load_recipe
    from ..run.terminal import Terminal

    show_stage(load_recipe(recipe, overrides or (), with_method or ()), stage, n, Terminal())


def asd(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A data file: LLaVA JSON, TRL JSONL or Parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write; a report is written beside it.")],
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of the samples to convert.")] = 0.2,
    seed: int = 0,
    converter: Annotated[Converter, typer.Option(help="What rewrites the answers.")] = Converter.rules,
    images: Annotated[Path | None, typer.Option(help="Folder of the images. Default: the folder of IN.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="How rows of another form are read: a published layout, or module:function.")
    ] = None,
    on_bad: Annotated[
        OnBad, typer.Option(help="What a bad sample is: an error, or left out and counted.")
    ] = OnBad.error,
    endpoint: Annotated[
        str | None, typer.Option(help="llm: an OpenAI-compatible endpoint, http://localhost:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="llm: the model, as the endpoint calls it.")] = None,
    api_key_env: Annotated[
        str, typer.Option(help="llm: the environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="llm: questions asked at once.")] = 16,
    timeout: Annotated[float, typer.Option(help="llm: seconds until a question is asked again.")] = 120,
    retries: Annotated[int, typer.Option(min=0, help="llm: how often a failed question is asked again.")] = 6,
    request: Annotated[str, typer.Option(help='llm: more of the request, as JSON: {"temperature": 0.7}')] = "{}",
) -> None:
    """Convert part of a data file's answers into other styles (answer-style diversification, SEFE).

    Rules need nothing; `--converter llm` asks a model that sees the images, behind `--endpoint`, and keeps its answers.

    Example: `mcit asd train.json train-asd.jsonl --fraction 0.2 --seed 0 --converter rules`
    """
    from ..data_tools.convert import asd_settings, convert_file
    from ..run.terminal import Terminal

    try:
        more = json.loads(request)
    except json.JSONDecodeError as error:
        raise InputError(f"is no JSON: {error.msg}", where="mcit asd", field="--request") from None
    settings = asd_settings(
        fraction=fraction,
        converter=converter.value,
        endpoint=endpoint,
        model=model,
        api_key_env=api_key_env,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        request=more,
    )
    terminal = Terminal()
    try:
        with terminal.working(f"convert {source.name}") as show:
            report = convert_file(source, target, settings, seed, images, show, layout=layout, on_bad=on_bad.value)
    except KeyboardInterrupt:
        if settings.converter == "llm":
            print("interrupted: the answers so far are kept, the same command goes on from there", file=sys.stderr)
        raise
    terminal.say(report["summary"])
    for note in report["notes"]:
        terminal.say(f"    {note}")
    if report["validation"]["failed"]:
        terminal.say(f"gold answers that are not right in their new style: {report['validation']['failed']}", "yellow")
    terminal.say(f"report: {target}.report.json")


def verify(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Recipes (KEY=VALUE changes theirs), or data files to train on."),
    ],
    images: Annotated[Path | None, typer.Option(help="Data files: the folder of their images.")] = None,
    test: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Data files that the others must not give away.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Data files: the base model whose tokens count.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Data files: tokens that fit. Default: the model's context.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Warnings count too: leaks, duplicates, contradictions, forms.")] = False,
    drop_bad: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a clean copy there, and what was left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the whole report there, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that would make training or scoring fail later. Exits 2 if there are errors.

    Decodes every image, counts every token, looks for what is tested on in any training data of the stream.

    Example: `mcit verify my-stream.yaml --out report.json` · `mcit verify train.json --images scans/ --test test.json`
    """
    from rich.console import Console

    from mcit.data_prep.files import check_output, write_json

    from ..data_tools.clean import check_target, write_clean
    from ..data_tools.verify import verify as verify_data
    from ..data_tools.verify_report import make_report, show_report
    from ..run.terminal import Terminal

    if drop_bad:
        check_target(drop_bad)
    if out:
        check_output(out, "--out")
    terminal = Terminal(Console(stderr=True, highlight=False, soft_wrap=True) if as_json else None)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(terminal.working("verify"))
        found = stack.enter_context(
            verify_data(data, images=images, tests=test or (), model=model, max_length=max_length, show=show)
        )
        report = make_report(found, strict)
        written = write_clean(found, strict, drop_bad) if drop_bad else []
    if out:
        write_json(out, report)
    if as_json:
        print_json(report)
    else:
        show_report(found, report, terminal)
    for line in written:
        terminal.say(line)
    if not report["clean"]:
        raise typer.Exit(2)
