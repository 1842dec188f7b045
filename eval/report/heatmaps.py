"""Heat-maps: what a run scores, and what it lost of form and of knowledge; as tables of the page and as a picture.

Cividis reads the same for colour-blind people and in grey print, and every cell has its figure in it.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mcit.data_prep.files import atomic_open

_SCALES = {"score": "cividis", "superficial": "Oranges", "essential": "Purples"}
_LIGHT = 0.55  # of the brightest: from here on the text is black


class Cell(NamedTuple):
    """One cell of a heat-map."""

    value: float | None
    error: float | None  # one standard error
    learned: bool  # whether this stage first trained the task
    style: str  # CSS


class Heatmap(NamedTuple):
    """A table whose rows are the stages and whose columns are the tasks."""

    title: str
    tasks: list[str]
    rows: list[tuple[str, list[Cell]]]


def score_heatmap(result: Mapping[str, Any]) -> Heatmap:
    """The matrix."""
    return _heatmap(result, "score", result["matrix"], result["stderr"])


def reasoning_heatmap(result: Mapping[str, Any]) -> Heatmap | None:
    """The matrix of reasoning scores, with the tasks that have some; None where no reasoning was judged."""
    reasoning = result.get("reasoning")
    if not reasoning:
        return None
    places = [i for i in range(len(result["tasks"])) if any(row[i] is not None for row in reasoning["n"])]
    tables = [[[row[i] for i in places] for row in reasoning[key]] for key in ("matrix", "stderr")]
    return _heatmap({**result, "tasks": [result["tasks"][i] for i in places]}, "score", *tables)


def loss_heatmaps(result: Mapping[str, Any]) -> list[Heatmap]:
    """What each task has lost since it was learned, after each stage, above chance; none where no task can be split.

    With shown and known as in `mcit.eval.forgetting`: essential is what known has fallen by, superficial is what shown
    has fallen by beyond that.
    """
    constrained = result.get("constrained")
    if not constrained:
        return []
    losses = {"superficial": _empty(result), "essential": _empty(result)}
    for place, task in enumerate(result["tasks"]):
        first = result["learned"].get(task["name"], len(result["stages"]))
        columns = {key: [row[place] for row in constrained[key]] for key in ("shown", "known")}
        for k in range(first + 1, len(result["stages"])):
            found = [columns[key][row] for key in ("shown", "known") for row in (first, k)]
            if None not in found:
                shown_then, shown_now, known_then, known_now = found
                losses["essential"][k][place] = known_then - known_now
                losses["superficial"][k][place] = (shown_then - shown_now) - (known_then - known_now)
    if all(loss is None for row in losses["essential"] for loss in row):
        return []
    return [_heatmap(result, name, table) for name, table in losses.items()]


def write_matrix_image(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The matrices side by side as a PNG: rows are stages, columns tasks, a frame marks where a task is learned."""
    width = sum(1.6 + 0.85 * len(r["tasks"]) for r in results)
    height = 1.6 + 0.42 * max(len(r["stages"]) for r in results)
    figure, axes = plt.subplots(1, len(results), figsize=(width, height), squeeze=False, layout="constrained")
    for axis, result in zip(axes[0], results, strict=True):
        _draw(axis, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    with atomic_open(path, "wb") as file:
        file.write(buffer.getvalue())


def colour(value: float | None, scale: str = "score") -> str:
    """CSS of a cell: a ground for 0–100 (what is below 0 looks like 0), and a text that can be read on it."""
    if value is None:
        return "background: #eee; color: #666"
    red, green, blue, _ = matplotlib.colormaps[_SCALES[scale]](min(max(value, 0), 100) / 100)
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > _LIGHT else "#fff"
    return f"background: rgb({255 * red:.0f}, {255 * green:.0f}, {255 * blue:.0f}); color: {ink}"


def _heatmap(
    result: Mapping[str, Any], title: str, table: Sequence[Sequence[float | None]], errors: Any = None
) -> Heatmap:
    names = [task["name"] for task in result["tasks"]]
    rows = []
    for r, stage in enumerate(result["stages"]):
        cells = [
            Cell(
                value, errors[r][c] if errors else None, result["learned"].get(name) == stage["k"], colour(value, title)
            )
            for c, (name, value) in enumerate(zip(names, table[r], strict=True))
        ]
        rows.append((f"{stage['k']} {stage['name']}", cells))
    return Heatmap(title, names, rows)


def _empty(result: Mapping[str, Any]) -> list[list[float | None]]:
    return [[None] * len(result["tasks"]) for _ in result["stages"]]


def _draw(axis: Any, result: Mapping[str, Any]) -> None:
    matrix = [[float("nan") if score is None else score for score in row] for row in result["matrix"]]
    axis.imshow(matrix, cmap=_SCALES["score"], vmin=0, vmax=100, aspect="auto")
    for r, row in enumerate(result["matrix"]):
        for c, score in enumerate(row):
            learned = result["learned"].get(result["tasks"][c]["name"]) == result["stages"][r]["k"]
            if score is not None:
                weight = "bold" if learned else "normal"
                tone = "black" if score > 100 * _LIGHT else "white"
                axis.text(c, r, f"{score:.0f}", ha="center", va="center", color=tone, weight=weight, fontsize=9)
            if learned:
                axis.add_patch(plt.Rectangle((c - 0.48, r - 0.47), 0.96, 0.94, fill=False, ec="#c00", lw=1.5))
    axis.set_xticks(range(len(result["tasks"])), [t["name"] for t in result["tasks"]], rotation=25, ha="right")
    axis.set_yticks(range(len(result["stages"])), [f"{s['k']} {s['name']}" for s in result["stages"]])
    axis.set_title(result["name"], fontsize=11)
    axis.tick_params(labelsize=8, length=0)
