"""The verbs of `mcit` about judges of reasoning: judging a run, data to tune a judge on, how far a judge agrees."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Overrides, RecipeArgument, RunDir, print_json


def judge(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Score the reasoning (`<think>`) in a run's answers with the judge that `eval.judge` names, a model or a program.

    Replies are kept: after an interruption the same command goes on, and what is judged already is not asked again.

    Example: `mcit judge runs/ctbench eval.judge.endpoint=http://localhost:8000/v1 eval.judge.model=NAME`
    """
    from ..run.runner import judge_run, show_results
    from ..run.terminal import Terminal
    from .runs import start

    terminal = Terminal()
    current = start(recipe, overrides, None, run_dir, "single", None, terminal)
    judge_run(current, terminal)
    show_results(current, terminal)


def judge_data(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A data file whose answers hold <think>…</think>.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write, one corrupted rationale a line.")],
    seed: int = 0,
) -> None:
    """Corrupt gold rationales in graded ways, with the ratings that follow: data to tune a judge on, or to test one.

    Example: `mcit judge-data runs/ctbench/data/math/train.jsonl rated-math.jsonl --seed 0`
    """
    from mcit.eval.judge.data import write_corrupted

    from ..run.terminal import Terminal

    counts = write_corrupted(source, target, seed)
    Terminal().say(f"{target}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))


def agreement(
    judged: Annotated[Path, typer.Argument(metavar="JUDGED.jsonl", help="Lines with id and scores, or a verdict.")],
    rated: Annotated[
        Path | None,
        typer.Argument(metavar="RATED.jsonl", help="Ratings by id. Default: those in the lines' references."),
    ] = None,
) -> None:
    """Say how far a judge agrees with ratings, as one JSON object: Spearman, Pearson, Kendall, with 95 % intervals.

    Example: `mcit agreement runs/mini-think/judgements/04/counting.jsonl ratings.jsonl`
    """
    from mcit.eval.judge.agreement import agreement_files

    print_json(agreement_files(judged, rated))
