"""General ability: what a policy still does of what no stage trains, and how that and the stream go together."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from .stats import mean

Table = list[list[Any]]  # rows are stages 0…K, columns tasks; None where a cell was not evaluated


class General(TypedDict):
    """`general` of `results.json`. Lists have a value a stage, 0…K; None where something is missing for it."""

    tasks: list[dict[str, Any]]  # as in `tasks`; they are never trained
    matrix: Table  # mean score, 0–100
    stderr: Table  # of each mean, clustered by image
    n: Table
    nll: Table  # mean negative log-likelihood of a token of the tasks' own answers, in nats, over a fixed few samples
    mean: list[float | None]  # over the tasks, 0–100
    mean_nll: list[float | None]
    f1: list[float | None]  # of that mean and the mean score on what has been learned so far; row 0 has none
    images: NotRequired[dict[str, Table]]  # as `images` of the stream


def general_ability(
    tasks: Sequence[dict[str, Any]],
    cells: Sequence[Sequence[Mapping[str, Any] | None]],
    matrix: Sequence[Sequence[float | None]],
    learned: Sequence[int],
) -> General:
    """Gather the general columns. `cells` are their markers, `matrix` and `learned` those of the stream."""

    def table(key: str) -> Table:
        return [[cell.get(key) if cell else None for cell in row] for row in cells]

    scores, nll = table("score"), table("nll")
    means = [_mean(row) for row in scores]
    seen = [
        _mean([score for score, first in zip(row, learned, strict=True) if first <= k]) for k, row in enumerate(matrix)
    ]
    return {
        "tasks": list(tasks),
        "matrix": scores,
        "stderr": table("stderr"),
        "n": table("n"),
        "nll": nll,
        "mean": means,
        "mean_nll": [_mean(row) for row in nll],
        "f1": [harmonic_mean(*pair) for pair in zip(means, seen, strict=True)],
    }


def general_metrics(general: General) -> dict[str, float | None]:
    """The last stage's figures, and the base's mean to set them against."""
    return {
        "general": general["mean"][-1],
        "general_base": general["mean"][0],
        "general_nll": general["mean_nll"][-1],
        "general_F1": general["f1"][-1],
    }


def harmonic_mean(one: float | None, other: float | None) -> float | None:
    """2ab / (a + b), and 0 where both are 0: GeRe's F1 (arXiv 2508.04676) of general ability and the stream's AP."""
    if one is None or other is None:
        return None
    return 2 * one * other / (one + other) if one + other else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
