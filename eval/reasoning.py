"""Reasoning beside answers: how a run's chains of thought score, and which of the two outlives the other.

Scores come from the judged cells (`mcit.eval.judge`). Per stage and task they form a matrix like that of the answers,
with the same metrics.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mcit.data_prep.files import read_jsonl

from .forgetting import Estimate, estimates
from .judge.cells import judgements
from .metrics import continual_metrics
from .stats import image_clusters, resampled_means

_METRICS = ("MFT", "MFN", "MAA", "BWT", "forgetting")
Table = list[list[Any]]
Markers = Sequence[Sequence[Mapping[str, Any] | None]]  # of the judged cells, shaped like the matrix


class Outlived(TypedDict):
    """What a task (or on average several) has lost since it was learned, in points of 0–100, on the same samples."""

    n: int  # samples with a score for their reasoning at both stages
    reasoning: Estimate  # loss of the reasoning score
    answer: Estimate  # loss of the answer score
    difference: Estimate  # answer − reasoning: above 0, reasoning outlives answers


class Reasoning(TypedDict):
    """`reasoning` of `results.json`. Tables are shaped like `matrix`; columns of tasks without reasoning are None."""

    judge: dict[str, Any]  # who judged: model, request, rubric version; or program
    matrix: Table  # mean reasoning score
    stderr: Table  # clustered by image
    n: Table  # samples behind it: judged, or without reasoning (0)
    logic: Table  # means over the reasoning there was
    grounding: Table
    knowledge: Table
    outcomes: Table  # how many samples were judged, had no reasoning, were cut off, or got no readable verdict
    tasks: dict[str, Outlived]  # learned before the last stage, judged when learned and at the end
    mean: Outlived | None  # over these tasks, each weighing the same


def reasoning_results(
    run: Path, tasks: Sequence[str], learned: Mapping[str, int], markers: Markers
) -> tuple[Reasoning, dict[str, float | None]] | None:
    """The section and its metrics (`reasoning_MFN`, …); None where nothing was judged. Rows are the stages 0…K.

    Only cells of one judge count together: those that another one left are not among `markers`.
    """
    known = [marker for row in markers for marker in row if marker]
    if not known:
        return None

    def table(pick: Callable[[Mapping[str, Any]], Any]) -> Table:
        return [[pick(marker) if marker else None for marker in row] for row in markers]

    matrix = table(lambda marker: marker["score"])
    last = len(markers) - 1
    columns = [i for i in range(len(tasks)) if any(row[i] for row in markers)]
    both = {
        tasks[i]: learned[tasks[i]]
        for i in columns
        if learned[tasks[i]] < last and markers[learned[tasks[i]]][i] and markers[last][i]
    }
    lost = {task: _values(run, task, first, last) for task, first in both.items()}
    lost = {task: found for task, found in lost.items() if len(found[0])}
    outlived, mean = _outlived(lost)
    section: Reasoning = {
        "judge": known[0]["judge"],
        "matrix": matrix,
        "stderr": table(lambda marker: marker["stderr"]),
        "n": table(lambda marker: marker["n"]),
        "logic": table(lambda marker: marker["dimensions"]["logic"]),
        "grounding": table(lambda marker: marker["dimensions"]["grounding"]),
        "knowledge": table(lambda marker: marker["dimensions"]["knowledge"]),
        "outcomes": table(lambda marker: marker["outcomes"]),
        "tasks": outlived,
        "mean": mean,
    }
    reasoned = [[row[i] for i in columns] for row in matrix]
    found = continual_metrics(reasoned, [learned[tasks[i]] for i in columns], row0=True)
    return section, {f"reasoning_{name}": found[name] for name in _METRICS}


def _values(run: Path, task: str, first: int, last: int) -> tuple[np.ndarray, list[Hashable]]:
    """[samples, 3] losses of reasoning, of the answer, and the second minus the first; and the images of the samples.

    Of the samples whose reasoning has a score at both stages.
    """
    reasoning, answers = (
        [{row["id"]: row for row in read_jsonl(place(k))} for k in (first, last)]
        for place in (
            lambda k: judgements(run, k, task),
            lambda k: run / "predictions" / f"{k:02d}" / f"{task}.jsonl",
        )
    )
    then, now = reasoning
    names = [name for name in now if name in then and None not in (then[name]["score"], now[name]["score"])]
    losses = [[table[0][name]["score"] - table[1][name]["score"] for table in (reasoning, answers)] for name in names]
    values = np.array([[one, other, other - one] for one, other in losses]).reshape(-1, 3)
    return values, image_clusters(now[name]["image_id"] for name in names)


def _outlived(
    lost: Mapping[str, tuple[np.ndarray, list[Hashable]]],
) -> tuple[dict[str, Outlived], Outlived | None]:
    """Of each task, and of their mean, with 95 % intervals by a bootstrap over images: a sample's figures are drawn
    together, the tasks independently of each other."""
    drawn = {task: resampled_means(table, images, seed) for seed, (task, (table, images)) in enumerate(lost.items())}
    tasks = {task: _estimates(len(table), table.mean(axis=0), drawn[task]) for task, (table, _) in lost.items()}
    if not tasks:
        return {}, None
    means = np.mean([table.mean(axis=0) for table, _ in lost.values()], axis=0)
    samples = sum(split["n"] for split in tasks.values())
    return tasks, _estimates(samples, means, np.mean([*drawn.values()], axis=0))


def _estimates(n: int, values: np.ndarray, drawn: np.ndarray) -> Outlived:
    reasoning, answer, difference = estimates(values, drawn)
    return {"n": n, "reasoning": reasoning, "answer": answer, "difference": difference}
