"""The curves of continual evaluation as a picture: a column a stage, in which a task falls, recovers or is learned."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from mcit.data_prep.files import atomic_open

from .strokes import COLUMNS, stroke

_ROWS = {"exact": "exact match, %", "logprob": "log-prob of a gold token, nats"}


def write_stability_image(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the `curves` of several runs (`results.json`) below each other into a PNG. Each run needs to have some.

    The steps of a stage are even up to the schedule's `dense` and logarithmic from there on, so that what happens right
    after a switch can be seen. Bands are one standard error, from the number of probes.
    """
    names = dict.fromkeys(task for result in results for task in result["curves"]["tasks"])
    styles = {task: stroke(number) for number, task in enumerate(names)}
    width = max(len(result["curves"]["ends"]) - 1 for result in results)
    height = len(_ROWS) * len(results)
    size = (1.4 + 2.3 * width, 0.9 + 1.9 * height)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for place, result in enumerate(results):
        for row, (key, label) in enumerate(_ROWS.items()):
            line = axes[len(_ROWS) * place + row]
            line[0].set_ylabel(f"{result['name']}\n{label}" if len(results) > 1 else label, fontsize=8)
            for k, axis in enumerate(line, 1):
                if k < len(result["curves"]["ends"]):
                    _draw_stage(axis, result, k, key, styles)
                else:
                    axis.set_axis_off()
    handles = {handle.get_label(): handle for axis in axes.flat for handle in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=COLUMNS, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    with atomic_open(path, "wb") as file:
        file.write(buffer.getvalue())


def _draw_stage(axis: Any, result: Mapping[str, Any], k: int, key: str, styles: Mapping[str, dict[str, str]]) -> None:
    """One stage: every task's scores against the steps since the switch."""
    curves = result["curves"]
    start, end = curves["ends"][k - 1], curves["ends"][k]
    for task, curve in curves["tasks"].items():
        if curve["steps"][0] >= end:  # not learned yet
            continue
        rows = zip(curve["steps"], curve[key], curve["stderr"], strict=True)
        points = [(step - start, value, error or 0.0) for step, value, error in rows if start <= step <= end]
        points = [point for point in points if point[1] is not None]
        places, values = [step for step, *_ in points], [value for _, value, _ in points]
        axis.plot(places, values, label=task, lw=1.4, marker=".", ms=2.5, **styles[task])
        if key == "exact":
            low, high = ([value + sign * error for _, value, error in points] for sign in (-1, 1))
            axis.fill_between(places, low, high, color=styles[task]["color"], alpha=0.12, lw=0)
    steps, dense = end - start, max(curves["schedule"]["dense"], 1)
    axis.set_xscale("symlog", linthresh=dense)
    axis.set_xticks([0, *([dense] if 1.5 * dense < steps else []), steps], minor=False)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(0, steps)
    axis.set_title(f"stage {k}: {result['stages'][k]['name']}", fontsize=9)
    axis.set_xlabel("steps since the switch", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
