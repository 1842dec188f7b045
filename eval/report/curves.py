"""Forgetting curves: each task's score from the stage that learned it to the last, of several runs side by side."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mcit.data_prep.files import atomic_open

from .strokes import stroke

_MARKERS = "osD^vPX*"


def write_curves_image(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a PNG: a panel a run, a line a task with one standard error; before it is learned a task is not drawn.

    Lines differ in colour, stroke and marker, so that they can be told apart without colour.
    """
    names = list(dict.fromkeys(task["name"] for result in results for task in result["tasks"]))
    size = (1.2 + 4.6 * len(results), 3.4)
    figure, axes = plt.subplots(1, len(results), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, result in zip(axes[0], results, strict=True):
        for place, task in enumerate(result["tasks"]):
            number = names.index(task["name"])
            points = _points(result, place)
            if points:
                stages, scores, errors = zip(*points, strict=True)
                marker = _MARKERS[number % len(_MARKERS)]
                axis.errorbar(
                    stages, scores, errors, label=task["name"], marker=marker, ms=4, lw=1.4, capsize=2, **stroke(number)
                )
        axis.set_xticks(
            [s["k"] for s in result["stages"][1:]], [s["name"] for s in result["stages"][1:]], rotation=25, ha="right"
        )
        axis.set_title(result["name"], fontsize=11)
        axis.set_ylim(-3, 103)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("score after the stage", fontsize=9)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    with atomic_open(path, "wb") as file:
        file.write(buffer.getvalue())


def _points(result: Mapping[str, Any], place: int) -> list[tuple[int, float, float]]:
    """(stage, score, standard error) of a task from when it was learned."""
    first = result["learned"].get(result["tasks"][place]["name"], len(result["stages"]))
    rows = list(zip(result["stages"], result["matrix"], result["stderr"], strict=True))[first:]
    return [(stage["k"], row[place], error[place] or 0.0) for stage, row, error in rows if row[place] is not None]
