"""The report page: what was learned and what was forgotten, in one self-contained HTML file.

`write_report([run])` writes `RUN/report/index.html`, `matrix.png` and, of a run that was asked while it trained,
`stability.png`; with several runs the page, written to `out`, sets them side by side. The page needs no network and no
server, escapes everything that a model said, and uses a colour scale (cividis) that reads the same for colour-blind
people and in grey print.
"""

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

from mcit.data_prep.files import atomic_open, read_json, read_jsonl

from .results import read_results
from .stability_image import write_stability_image

METRICS = {  # the order of the table, and what each says
    "MFT": "mean score right after a task was learned",
    "MFN": "mean score after the last stage",
    "MAA": "mean over stages of the mean score on what was learned so far",
    "BWT": "mean change since learned (below 0: forgotten)",
    "forgetting": "mean drop from a task's best score",
    "FWT": "mean gain on a task before it is trained, over the base",
    "superficial": "mean loss of earlier tasks that answers held to the form do not show: form, not knowledge",
    "essential": "mean loss of earlier tasks that they do show: knowledge",
    "recoverable": "final answers on earlier tasks that are right but for their form, %",
    "TA": "CoIN's Truth Alignment: mean score after the last stage, in the form asked for",
    "KC": "its Knowledge Capability, by rules: the same of what the answers say, whatever their form",
    "general": "mean score on the general tasks after the last stage",
    "general_base": "the same of the untouched base",
    "general_nll": "nats a token of the general tasks' own answers, after the last stage (less is better)",
    "general_F1": "harmonic mean of general and MFN",
    "min_ACC": "mean over earlier tasks of the worst score since learned, inside stages too (teacher-forced probes)",
    "WC_ACC": "the same with the tasks of the last stage at its end: the worst case a user met",
    "WF": "mean over tasks of the largest fall within 10 optimizer steps",
    "WP": "mean over tasks of the largest rise within 10 optimizer steps",
    "WF_100": "the largest fall within 100 steps",
    "WP_100": "the largest rise within 100 steps",
    "LCA": "mean score on a task over its first 10 steps",
}
VERDICTS = {
    "correct": "right",
    "wrong_format": "right content, wrong form (recoverable)",
    "wrong_content": "right form, wrong content",
    "wrong_both": "wrong form, and no right content found in it",
}
SAMPLES_PER_CELL = 8  # answers shown of each (task, stage) in the browser of answers


def write_report(run_dirs: list[Path], out: Path | None = None) -> Path:
    """Write the page for one run, or for several side by side; returns the path of `index.html`.

    `out` is the folder to write into (default: the report folder of the first run). Raises `InputError` for a run
    without `results.json`.
    """
    results: list[dict[str, Any]] = [dict(read_results(Path(run))) for run in run_dirs]
    out = Path(out) if out else Path(run_dirs[0]) / "report"
    out.mkdir(parents=True, exist_ok=True)
    write_matrix_image(results, out / "matrix.png")
    if measured := [result for result in results if result.get("curves")]:
        write_stability_image(measured, out / "stability.png")
    else:
        (out / "stability.png").unlink(missing_ok=True)  # of an earlier recipe
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        title=" · ".join(r["name"] for r in results),
        runs=[_view(Path(run), result) for run, result in zip(run_dirs, results, strict=True)],
        metrics={name: METRICS[name] for name in METRICS if any(name in result["metrics"] for result in results)},
        verdicts=VERDICTS,
        colour=_colour,
        shown=_shown,
        answers=_script_json([_answers(Path(run), r) for run, r in zip(run_dirs, results, strict=True)]),
    )
    with atomic_open(out / "index.html") as file:
        file.write(page)
    return out / "index.html"


def summary_sentences(result: dict[str, Any]) -> list[str]:
    """What happened, in words: what was kept, what was forgotten most and when, and in which way answers are wrong."""
    metrics, tasks = result["metrics"], [task["name"] for task in result["tasks"]]
    sentences = []
    if metrics.get("MFT") is not None and metrics.get("MFN") is not None:
        sentences.append(
            f"Right after being learned the tasks scored {metrics['MFT']:.1f} on average; "
            f"after the last stage they score {metrics['MFN']:.1f}."
        )
    worst = _worst_drop(result)
    if worst:
        task, before, after, stage, when = worst
        sentences.append(
            f"Forgot most: {task}, from {before:.1f} to {after:.1f}; "
            f"the largest step of it came with stage {stage} ({when})."
        )
    elif len(tasks) > 1:
        sentences.append("No task lost anything by the last stage.")
    shares = old_task_verdicts(result)
    if shares:
        wrong = 1 - shares["correct"]
        if wrong > 0:
            sentences.append(
                f"On the tasks of earlier stages, {100 * wrong:.0f} % of the final answers are wrong: "
                f"{100 * shares['wrong_format']:.0f} % only in form, {100 * shares['wrong_content']:.0f} % only in "
                f"content, {100 * shares['wrong_both']:.0f} % in both."
            )
        split = (result.get("forgetting") or {}).get("mean")
        if split and split["loss"]["value"] > 0:
            loss, essential, superficial = (split[part]["value"] for part in ("loss", "essential", "superficial"))
            sentences.append(
                f"Above chance they lost {loss:.1f} points: {essential:.1f} are essential, gone from answers held to "
                f"the form too; {superficial:.1f} are superficial, which is what ASD is made against."
            )
        elif wrong > 0 and shares["wrong_format"] + shares["wrong_both"] > wrong / 2:
            sentences.append(
                "Most of what was lost shows as a foreign answer style, which is what ASD is made against."
            )
        elif wrong > 0:
            sentences.append("Most wrong answers have the right form: knowledge, not style, is what was lost.")
    return sentences


def old_task_verdicts(result: dict[str, Any]) -> dict[str, float] | None:
    """Mean verdict shares (0–1), after the last stage, of the tasks learned before it; None if there are none."""
    last = len(result["stages"]) - 1
    cells = [
        result["verdicts"][last][i]
        for i, task in enumerate(result["tasks"])
        if result["learned"].get(task["name"], last) < result["stages"][last]["k"]
    ]
    cells = [cell for cell in cells if cell]
    if not cells:
        return None
    return {verdict: sum(cell[verdict] for cell in cells) / len(cells) for verdict in VERDICTS}


def _worst_drop(result: dict[str, Any]) -> tuple[str, float, float, int, str] | None:
    """(task, score when learned, final score, stage of the largest single drop, that stage's name), or None."""
    worst, matrix, stages = None, result["matrix"], result["stages"]
    for i, task in enumerate(result["tasks"]):
        learned = result["learned"].get(task["name"])
        rows = [r for r, stage in enumerate(stages) if learned is not None and stage["k"] >= learned]
        column = [(r, matrix[r][i]) for r in rows if matrix[r][i] is not None]
        if len(column) < 2 or column[-1][1] >= column[0][1]:
            continue
        steps = [(a[1] - b[1], b[0]) for a, b in itertools.pairwise(column)]
        row = max(steps)[1]
        drop = column[0][1] - column[-1][1]
        if worst is None or drop > worst[0]:
            worst = (drop, (task["name"], column[0][1], column[-1][1], stages[row]["k"], stages[row]["name"]))
    return worst[1] if worst else None


def _view(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "result": result,
        "summary": summary_sentences(result),
        "old": old_task_verdicts(result),
        "provenance": {
            "run": str(run),
            "method": ", ".join(result["method"]) or "sequential (none)",
            "seed": result["seed"],
            **{key: value for key, value in result["versions"].items() if value},
            **{f"{key} hash": value[:16] for key, value in result["hashes"].items() if isinstance(value, str)},
        },
    }


def _shown(estimate: dict[str, float | None]) -> str:
    """`12.3 [8.0, 16.1]`."""
    bounds = "" if estimate["low"] is None else f" [{estimate['low']:.1f}, {estimate['high']:.1f}]"
    return f"{estimate['value']:.1f}{bounds}"


def _colour(score: float | None) -> str:
    """CSS for a cell of score 0–100: a cividis ground with readable text on it."""
    if score is None:
        return "background: #eee; color: #666"
    red, green, blue, _ = (round(255 * channel) for channel in matplotlib.colormaps["cividis"](score / 100))
    text = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 125 else "#fff"
    return f"background: rgb({red}, {green}, {blue}); color: {text}"


def write_matrix_image(results: list[dict[str, Any]], path: Path) -> None:
    """Heat-maps of the matrices side by side: rows are stages, columns tasks, a frame marks where a task is learned."""
    width = sum(1.6 + 0.85 * len(r["tasks"]) for r in results)
    height = 1.6 + 0.42 * max(len(r["stages"]) for r in results)
    figure, axes = plt.subplots(1, len(results), figsize=(width, height), squeeze=False, layout="constrained")
    for axis, result in zip(axes[0], results, strict=True):
        matrix = [[float("nan") if score is None else score for score in row] for row in result["matrix"]]
        axis.imshow(matrix, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for r, row in enumerate(result["matrix"]):
            for c, score in enumerate(row):
                learned = result["learned"].get(result["tasks"][c]["name"]) == result["stages"][r]["k"]
                if score is not None:
                    weight = "bold" if learned else "normal"
                    tone = "black" if score > 55 else "white"
                    axis.text(c, r, f"{score:.0f}", ha="center", va="center", color=tone, weight=weight, fontsize=9)
                if learned:
                    axis.add_patch(plt.Rectangle((c - 0.48, r - 0.47), 0.96, 0.94, fill=False, ec="#c00", lw=1.5))
        axis.set_xticks(range(len(result["tasks"])), [t["name"] for t in result["tasks"]], rotation=25, ha="right")
        axis.set_yticks(range(len(result["stages"])), [f"{s['k']} {s['name']}" for s in result["stages"]])
        axis.set_title(result["name"], fontsize=11)
        axis.tick_params(labelsize=8, length=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    with atomic_open(path, "wb") as file:
        file.write(buffer.getvalue())


def _answers(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    """For the browser of answers: per task, the same few questions with the answer after every evaluated stage.

    Half of the questions are ones that were right when learned and wrong at the end, if there are such.
    """
    tasks = {}
    for i, task in enumerate(result["tasks"]):
        rows = {
            stage["k"]: {row["id"]: row for row in read_jsonl(path)}
            for r, stage in enumerate(result["stages"])
            if result["matrix"][r][i] is not None
            and (path := run / "predictions" / f"{stage['k']:02d}" / f"{task['name']}.jsonl").exists()
        }
        if not rows:
            continue
        last = rows[max(rows)]
        learned = rows.get(result["learned"].get(task["name"], -1), last)
        lost = [k for k in last if k in learned and learned[k]["verdict"] == "correct" != last[k]["verdict"]]
        chosen = (lost[: SAMPLES_PER_CELL // 2] + [k for k in last if k not in lost])[:SAMPLES_PER_CELL]
        samples = {s["id"]: s for s in read_jsonl(run / "data" / task["name"] / "test.jsonl")}
        image_root = run / "data" / task["name"] / read_json(run / "data" / task["name"] / "task.json")["image_root"]
        tasks[task["name"]] = [
            {
                "prompt": samples[k]["prompt"][-1]["content"],
                "images": [_thumbnail(image_root / image) for image in samples[k]["images"]],
                "references": last[k]["references"],
                "answers": [
                    {"stage": stage, "response": cell[k]["response"][:2000], "verdict": cell[k]["verdict"]}
                    for stage, cell in sorted(rows.items())
                    if k in cell
                ],
            }
            for k in chosen
        ]
    return {"name": result["name"], "stages": [s["name"] for s in result["stages"]], "tasks": tasks}


def _thumbnail(path: Path) -> str:
    """An image as a data URI of at most 256 pixels a side."""
    with Image.open(path) as file:
        image = file.convert("RGB")
        image.thumbnail((256, 256))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _script_json(value: Any) -> Markup:
    """JSON that is safe inside a <script> element: no `<`, `>` or `&` survives, whatever a model answered."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
