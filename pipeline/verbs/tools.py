"""The verbs of `mcit` that need no run: what exists, what this machine can do, scores of results from elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, print_json


def methods(as_json: AsJson = False) -> None:
    """List the methods against forgetting: paper, category, what they keep, where they work.

    Example: `mcit methods --json`
    """
    from ..methods import EXPANSIONS, METHODS
    from ..run.terminal import Terminal

    rows = [
        {
            "name": name,
            "paper": method.paper,
            "category": method.category,
            "keeps": method.keeps,
            "cost": method.cost,
            "lineages": list(method.lineages),
            "paradigms": list(method.paradigms),
            "distributed": list(method.distributed),
            "conflicts": list(method.conflicts),
            "settings": method.Config().model_dump(),
        }
        for name, method in METHODS.items()
    ]
    rows += [{"name": name, "expands_to": parts} for name, parts in EXPANSIONS.items()]
    if as_json:
        print_json(rows)
        return
    terminal, width = Terminal(), max(len(row["name"]) for row in rows) + 2
    for row in rows:
        if "expands_to" in row:
            terminal.say(f"{row['name']:{width}}= {' + '.join(row['expands_to'])}")
        else:
            terminal.say(f"{row['name']:{width}}{row['category']}, keeps {row['keeps']}; {row['paper']}")
            terminal.say(f"{'':{width}}lineage {', '.join(row['lineages'])}; {', '.join(row['paradigms'])}")
            terminal.say(f"{'':{width}}{json.dumps(row['settings'])}")
            alone = f"; not with {', '.join(row['conflicts'])}" if row["conflicts"] else ""
            terminal.say(f"{'':{width}}costs {row['cost']}{alone}")


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, and why not.

    Example: `mcit doctor`
    """
    from ..run.doctor import findings
    from ..run.terminal import Terminal

    terminal = Terminal()
    with terminal.working("looking around"):
        found = findings()
    if as_json:
        print_json([finding._asdict() for finding in found])
        return
    for finding in found:
        remedy = "" if finding.ok else f"  → {finding.remedy}"
        terminal.say(
            f"{'ok' if finding.ok else 'no':4}{finding.name:14}{finding.found}{remedy}", "" if finding.ok else "yellow"
        )


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

        print_json(read_sweep(matrix)["metrics"] if is_sweep(matrix) else metrics_file(matrix / "results.json"))
    else:
        print_json(metrics_file(matrix))


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

    print_json(score_file(kind, predictions, protocol=protocol, samples=samples, per_sample=per_sample))
