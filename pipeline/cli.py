"""The `mcit` command.

Exit codes: 0 done, 2 bad input (one line says which), 1 our fault, 75 asked to stop (by SLURM, say), 130 interrupted.
"""

import contextlib
import errno
import json
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mcit.data_prep.errors import InputError

app = typer.Typer(
    help="Continual instruction tuning of vision-language models: tune task after task, measure what was forgotten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a packaged recipe (`mini/sefe`), or a run directory.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change: `seed=1`, `stream.digits.test=0.2`."),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="METHOD", help="Add a method: a name (`mcit methods`), a file, or module:Class."),
]
RunDir = Annotated[Path | None, typer.Option(help="Where the run is kept. Default: runs/<the recipe's name>.")]
LaunchOption = Annotated[str, typer.Option(help="single, ddp, zero2, zero3, or an accelerate configuration file.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="Number of training processes, on each node.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Converter(StrEnum):
    """What `mcit asd` can convert with."""

    rules = "rules"
    llm = "llm"


def main() -> None:
    """Entry point of the console script."""
    from .child import ChildFailed
    from .preemption import EXIT_CODE, Preempted, preemptible

    try:
        with preemptible():
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}. Make room and run it again: what is done is kept", file=sys.stderr)
        sys.exit(2)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_CODE)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    launch: LaunchOption = "single",
    gpus: Gpus = None,
    print_config: Annotated[
        bool, typer.Option(help="Print what the recipe and each stage resolve to; do nothing.")
    ] = False,
) -> None:
    """Do everything: prepare, tune each stage, evaluate, report. Again: it continues, and redoes nothing unchanged.

    A recipe with a `sweep` is run under each of its seeds and orders, `sweep={seed: [0, 1, 2]}`.

    Example: `mcit run mini/sequential --with sefe seed=1 --run-dir runs/sefe-1`
    """
    from .run import perform_steps, show_results, start_run
    from .terminal import Terminal

    if print_config:
        print(_configuration(recipe, overrides, with_method), end="")
        return
    terminal = Terminal()
    loaded, directory, launcher = _found(recipe, overrides, with_method, run_dir, launch, gpus)
    if loaded.sweep:
        from .reports import report as show_report
        from .sweep import run_sweep, start_sweep

        run_sweep(start_sweep(loaded, directory, launcher, terminal), terminal)
        show_report([directory], None, terminal)
        return
    current = start_run(loaded, directory, launcher, terminal)
    perform_steps(current, current.steps(), terminal)
    show_results(current, terminal)


@app.command()
def prepare(
    recipe: RecipeArgument, overrides: Overrides = None, with_method: With = None, run_dir: RunDir = None
) -> None:
    """Prepare and check the data of all tasks.

    Example: `mcit prepare mini/sefe`
    """
    from .run import perform_steps
    from .terminal import Terminal

    terminal = Terminal()
    current = _start(recipe, overrides, with_method, run_dir, "single", None, terminal)
    perform_steps(current, current.preparation(), terminal)


@app.command()
def train(
    recipe: RecipeArgument,
    stage: Annotated[int, typer.Option(help="1 is the first.")],
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    launch: LaunchOption = "single",
    gpus: Gpus = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a SLURM job on which `srun` starts this command.")] = 1,
) -> None:
    """Train one stage; the stage before must be done.

    Example: `mcit train mini/sefe --stage 2`
    """
    from .run import train_stage
    from .terminal import Terminal

    terminal = Terminal()
    train_stage(_start(recipe, overrides, with_method, run_dir, launch, gpus, terminal, nodes), stage, terminal)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    stage: Annotated[int | None, typer.Option(help="Evaluate this one alone (0: the base), and no more.")] = None,
) -> None:
    """Evaluate the stages that are done, in the cells that `eval.cells` asks for, and print the matrix.

    Example: `mcit eval runs/mini-sefe eval.engine=transformers`
    """
    from .run import evaluate_stage, perform_steps, show_results
    from .terminal import Terminal

    terminal = Terminal()
    current = _start(recipe, overrides, None, run_dir, "single", None, terminal)
    if stage is not None:
        evaluate_stage(current, stage, terminal)
        return
    perform_steps(current, [current.evaluate(partly=True), current.results(), current.report()], terminal)
    show_results(current, terminal)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several to set side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: RUN/report; of several, report/ beside the first.")
    ] = None,
) -> None:
    """Write the report page of a run or a sweep, or of several side by side, each compared with the first.

    Example: `mcit report runs/mini-sequential runs/mini-sefe --out runs/comparison`
    """
    from .reports import report as show_report
    from .terminal import Terminal

    show_report(runs, out, Terminal())


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    partition: Annotated[str | None, typer.Option(help="Of every job for which the profile names no other.")] = None,
    account: Annotated[str | None, typer.Option(help="The same.")] = None,
    time: Annotated[str | None, typer.Option(help="The same: the longest a job may take, as 24:00:00.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many train a stage.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="How many train on each; 0: the CPU does.")] = 1,
    launch: Annotated[str | None, typer.Option(help="As of `mcit run`. Default: single for one GPU, else ddp.")] = None,
    profile: Annotated[Path | None, typer.Option(help="What the site wants to be told (docs/cluster.md).")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="The same as sweep.seed=[0,1,2].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the job scripts, submit nothing.")] = False,
) -> None:
    """Submit what is left of a run to SLURM: the steps of `mcit run` as jobs, each stage evaluated beside the next.

    The runs of a sweep share array jobs.

    Example: `mcit submit coin/sefe data=/data/CoIN --partition gpu --gpus-per-node 8 --launch zero2 --time 24:00:00`
    """
    from mcit.slurm.profile import Site, read_profile
    from mcit.slurm.submit import submit as submit_jobs

    from .terminal import Terminal

    options = {"partition": partition, "account": account, "time": time}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    site = Site(read_profile(profile), given, nodes, gpus_per_node, launch)
    swept = [*(overrides or ()), *([f"sweep.seed=[{seeds}]"] if seeds else ())]
    loaded, directory, _ = _found(recipe, swept, with_method, run_dir, "single", None)
    submit_jobs(loaded, directory, site, Terminal(), dry_run)


@app.command()
def cancel(run: Annotated[Path, typer.Argument(help="A run directory, or a sweep's.")]) -> None:
    """Cancel the SLURM jobs of a run that are queued or running; what is done stays done.

    Example: `mcit cancel runs/coin-sefe`
    """
    from mcit.slurm.status import cancel as cancel_jobs

    from .terminal import Terminal

    cancel_jobs(run, Terminal())


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run directory, or a sweep's.")], as_json: AsJson = False
) -> None:
    """Say what is done, running and left, and where its SLURM jobs are.

    Example: `mcit status runs/mini-sefe`
    """
    from mcit.slurm.status import full_status

    from .terminal import Terminal

    found = full_status(run)
    if as_json:
        _print_json(found)
    else:
        Terminal().status(found)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods against forgetting: paper, category, what they keep, where they work.

    Example: `mcit methods --json`
    """
    from .methods import EXPANSIONS, METHODS
    from .terminal import Terminal

    rows = [
        {
            "name": name,
            "paper": method.paper,
            "category": method.category,
            "keeps": method.keeps,
            "lineages": list(method.lineages),
            "paradigms": list(method.paradigms),
            "distributed": list(method.distributed),
            "settings": method.Config().model_dump(),
        }
        for name, method in METHODS.items()
    ]
    rows += [{"name": name, "expands_to": parts} for name, parts in EXPANSIONS.items()]
    if as_json:
        _print_json(rows)
        return
    terminal = Terminal()
    for row in rows:
        if "expands_to" in row:
            terminal.say(f"{row['name']:10}= {' + '.join(row['expands_to'])}")
        else:
            terminal.say(f"{row['name']:10}{row['category']}, keeps {row['keeps']}; {row['paper']}")
            terminal.say(
                f"{'':10}lineage {', '.join(row['lineages'])}; {', '.join(row['paradigms'])}; {row['settings']}"
            )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, and why not.

    Example: `mcit doctor`
    """
    from .doctor import findings
    from .terminal import Terminal

    terminal = Terminal()
    with terminal.working("looking around"):
        found = findings()
    if as_json:
        _print_json([finding._asdict() for finding in found])
        return
    for finding in found:
        remedy = "" if finding.ok else f"  → {finding.remedy}"
        terminal.say(
            f"{'ok' if finding.ok else 'no':4}{finding.name:14}{finding.found}{remedy}", "" if finding.ok else "yellow"
        )


@app.command()
def metrics(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.json", help="Or the folder of a run or of a sweep.")],
) -> None:
    """Print all continual-learning metrics of a score matrix as one JSON object.

    The file holds `{"matrix": [[…]]}`: rows are stages, columns tasks, scores 0–100; `"row0": true` when the first row
    is the base; optionally `learned`, the stage that first trained each task. Of a sweep: means with intervals.

    Example: `mcit metrics matrix.json`
    """
    from mcit.eval.metrics import metrics_file

    if matrix.is_dir():
        from mcit.eval.sweep import is_sweep, read_sweep

        _print_json(read_sweep(matrix)["metrics"] if is_sweep(matrix) else metrics_file(matrix / "results.json"))
    else:
        _print_json(metrics_file(matrix))


@app.command()
def score(
    kind: Annotated[str, typer.Argument(help="mcq, yes_no, short, …, or module:function.")],
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS.jsonl", help="Per line: id, response, references.")
    ],
    protocol: Annotated[
        str | None, typer.Option(metavar="FAMILY:TASK", help="Score as a published script does: coin:imagenet.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="TEST.jsonl", help="A prepared test part: every sample must be answered.")
    ] = None,
    per_sample: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Also write each line with its score here.")
    ] = None,
) -> None:
    """Score predictions that were made elsewhere; prints one JSON object with score, n and stderr.

    Kinds and protocols are listed in docs/evaluation.md. Beside a protocol's score stands that of the kind.

    Example: `mcit score short predictions.jsonl --protocol coin:imagenet --per-sample scored.jsonl`
    """
    from mcit.eval.predictions import score_file

    _print_json(score_file(kind, predictions, protocol=protocol, samples=samples, per_sample=per_sample))


@app.command()
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
    from .recipe import load_recipe
    from .show import show_stage
    from .terminal import Terminal

    show_stage(load_recipe(recipe, overrides or (), with_method or ()), stage, n, Terminal())


@app.command()
def ask(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    question: Annotated[str, typer.Argument(help="As the model is to read it, format sentence and options included.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; several if repeated.")] = None,
    stage: Annotated[list[int] | None, typer.Option(help="0 is the base; several if repeated. Default: all.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Recipe keys to change: eval.engine=vllm.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask the policies of several stages one question, side by side.

    Example: `mcit ask runs/mini-sefe "Is there a red circle? Answer yes or no." --image x.png --stage 0 --stage 5`
    """
    from rich.console import Console

    from mcit.eval.ask import ask as ask_policies
    from mcit.eval.ask import read_policies

    from .recipe import load_recipe
    from .terminal import Terminal

    # What libraries remark while an engine starts goes into a log elsewhere; here it would bury the answer.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    policies = read_policies(run, stage or ())
    config = load_recipe(run, overrides or (), check_methods=False).eval
    terminal = Terminal(Console(stderr=True, highlight=False, soft_wrap=True) if as_json else None)
    with terminal.working("ask") as show:
        answers = ask_policies(policies, question, image or (), config, show)
    if as_json:
        _print_json([answer._asdict() for answer in answers])
        return
    rows = [
        (
            f"{a.stage} {a.name}",
            a.answer if a.finished else f"{a.answer} … (cut off)",
            "" if a.probability is None else f"{a.probability:.2f}",
        )
        for a in answers
    ]
    terminal.table(question, ("policy of stage", "answer", "its probability"), rows)


@app.command()
def asd(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A data file: LLaVA JSON, TRL JSONL or Parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write; a report is written beside it.")],
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of the samples to convert.")] = 0.2,
    seed: int = 0,
    converter: Annotated[Converter, typer.Option(help="What rewrites the answers.")] = Converter.rules,
    images: Annotated[Path | None, typer.Option(help="Folder of the images. Default: the folder of IN.")] = None,
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
    from .convert import asd_settings, convert_file
    from .terminal import Terminal

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
            report = convert_file(source, target, settings, seed, images, show)
    except KeyboardInterrupt:
        if settings.converter == "llm":
            print("interrupted: the answers so far are kept, the same command goes on from there", file=sys.stderr)
        raise
    terminal.say(report["summary"])
    if report["validation"]["failed"]:
        terminal.say(f"gold answers that are not right in their new style: {report['validation']['failed']}", "yellow")
    terminal.say(f"report: {target}.report.json")


@app.command()
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
    """Find everything that would make training or scoring fail later. Exits 2 if there is anything.

    Decodes every image, counts every token, looks for what is tested on in any training data of the stream.

    Example: `mcit verify my-stream.yaml --out report.json` · `mcit verify train.json --images scans/ --test test.json`
    """
    from rich.console import Console

    from mcit.data_prep.files import write_json

    from .clean import check_target, write_clean
    from .terminal import Terminal
    from .verify import verify as verify_data
    from .verify_report import make_report, show_report

    if drop_bad:
        check_target(drop_bad)
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
        _print_json(report)
    else:
        show_report(found, report, terminal)
    for line in written:
        terminal.say(line)
    if not report["clean"]:
        raise typer.Exit(2)


def _found(
    recipe: str,
    overrides: list[str] | None,
    with_method: list[str] | None,
    run_dir: Path | None,
    launch: str,
    gpus: int | None,
    nodes: int = 1,
) -> tuple[Any, Path, Any]:
    """The recipe, directory and launch that the arguments mean: a run directory is taken up where it is."""
    from .recipe import load_recipe
    from .step import Launch

    loaded = load_recipe(recipe, overrides or (), with_method or ())
    directory = run_dir or (Path(recipe) if Path(recipe).is_dir() else Path("runs") / loaded.name)
    return loaded, directory, Launch.named(launch, gpus, nodes)


def _start(
    recipe: str,
    overrides: list[str] | None,
    with_method: list[str] | None,
    run_dir: Path | None,
    launch: str,
    gpus: int | None,
    terminal: Any,
    nodes: int = 1,
) -> Any:
    """The run that the arguments mean, for commands that do one step of it."""
    from .orders import members
    from .run import start_run

    loaded, directory, launcher = _found(recipe, overrides, with_method, run_dir, launch, gpus, nodes)
    if loaded.sweep:
        first, *others = members(loaded)
        remedy = f"Name the folder of one ({directory / first.name}), or add sweep=null; `mcit run` runs all"
        raise InputError(f"is a sweep of {len(others) + 1} runs", where=recipe, field="sweep", remedy=remedy)
    return start_run(loaded, directory, launcher, terminal)


def _configuration(recipe: str, overrides: list[str] | None, with_method: list[str] | None) -> str:
    """The resolved recipe, and as a second YAML document what each stage resolves to."""
    from .recipe import dump_recipe, load_recipe
    from .recipe_yaml import to_yaml

    loaded = load_recipe(recipe, overrides or (), with_method or ())
    stages = [
        {"stage": stage.k, "name": stage.name, "tasks": stage.tasks, "train": stage.train.model_dump(mode="json")}
        for stage in loaded.stages
    ]
    return f"# The recipe\n{to_yaml(dump_recipe(loaded))}---\n# What each stage resolves to\n{to_yaml(stages)}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
