"""The report of one run, or of several side by side: a page, the same facts as Markdown, and the figures."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mcit.data_prep.files import atomic_open

from ..compare import Comparison
from ..results import read_results
from .answers import data_uri, read_answers
from .curves import write_curves_image
from .heatmaps import colour, loss_heatmaps, reasoning_heatmap, score_heatmap, write_matrix_image
from .stability import write_stability_image
from .words import (
    METRICS,
    VERDICTS,
    bounds_of,
    difference_sentence,
    headline,
    old_task_verdicts,
    provenance,
    sentences,
    signed,
    unscored,
    with_bounds,
)

_HERE = Path(__file__).parent
_CAPTIONS = {
    "score": "Score on each task after each stage, ± one standard error (bold: where the task was learned):",
    "superficial": "Lost since learned, superficial: form, with the knowledge behind it (points above chance):",
    "essential": "Lost since learned, essential: knowledge (points above chance):",
}


def write_report(
    run_dirs: Sequence[Path], out: Path | None = None, comparisons: Mapping[int, Comparison] | None = None
) -> Path:
    """Write `index.html`, `report.md`, `matrix.png`, `curves.png` and, of runs that were asked while they trained,
    `stability.png`; returns the path of `index.html`.

    The page needs no network and no other file, and escapes everything that a model said. `out` is the folder to write
    into (default: the report folder of the first run), `comparisons` how runs differ from the first one, by their place
    in `run_dirs`. Raises `InputError` for a run without `results.json`.
    """
    paths = [Path(path) for path in run_dirs]
    results: list[dict[str, Any]] = [dict(read_results(path)) for path in paths]
    for result, name in zip(results, _names(paths, results), strict=True):
        result["name"] = name
    out = Path(out) if out else paths[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    write_matrix_image(results, out / "matrix.png")
    write_curves_image(results, out / "curves.png")
    (out / "stability.png").unlink(missing_ok=True)  # of an earlier recipe
    if measured := [result for result in results if result.get("curves")]:
        write_stability_image(measured, out / "stability.png")
    facts = _facts(results, comparisons or {})
    answers = [read_answers(path, result) for path, result in zip(paths, results, strict=True)]
    page = _template("page.html.j2", autoescape=True).render(
        facts,
        style=_inline("style.css"),
        script=_inline("answers.js"),
        answers=_script_json(answers),
        curves=_image(out / "curves.png"),
        stability=_image(out / "stability.png"),
        colour=colour,
    )
    markdown = _template("report.md.j2", autoescape=False).render(facts, captions=_CAPTIONS)
    for name, text in (("index.html", page), ("report.md", markdown)):
        with atomic_open(out / name) as file:
            file.write(text)
    return out / "index.html"


def _facts(results: Sequence[Mapping[str, Any]], comparisons: Mapping[int, Comparison]) -> dict[str, Any]:
    """What the page and the Markdown have in common."""
    named = {results[place]["name"]: comparison for place, comparison in comparisons.items()}
    return {
        "title": " · ".join(result["name"] for result in results),
        "runs": [_view(result) for result in results],
        "metrics": {name: METRICS[name] for name in METRICS if any(name in result["metrics"] for result in results)},
        "verdicts": VERDICTS,
        "differences": [difference_sentence(results[0]["name"], name, found) for name, found in named.items()],
        "estimate": _estimate,
        "compared": {name: _compared(comparison) for name, comparison in named.items()},
    }


def _view(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": result["name"],
        "result": result,
        "headline": headline(result),
        "sentences": sentences(result),
        "scores": score_heatmap(result),
        "losses": loss_heatmaps(result),
        "reasoning": reasoning_heatmap(result),
        "unscored": unscored(result),
        "metrics": {name: with_bounds(result["metrics"].get(name), bounds_of(result, name)) for name in METRICS},
        "old": old_task_verdicts(result),
        "provenance": provenance(result),
    }


def _estimate(part: Mapping[str, Any]) -> str:
    """`12.3 [10.1, 14.5]`."""
    return with_bounds(part["value"], (part["low"], part["high"]) if part["low"] is not None else None)


def _compared(comparison: Comparison) -> list[tuple[str, str, int]]:
    known = {**comparison["tasks"], "MFN": comparison["MFN"], "BWT": comparison["BWT"]}
    return [(name, signed(found), found["n"]) for name, found in known.items() if found]


def _names(paths: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs' names; where two have the same (seeds of one recipe), each with its folder's."""
    times = Counter(result["name"] for result in results)
    return [
        f"{result['name']} ({path.resolve().name})" if times[result["name"]] > 1 else result["name"]
        for path, result in zip(paths, results, strict=True)
    ]


def _template(name: str, autoescape: bool) -> Any:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name)


def _inline(name: str) -> Markup:
    """A style sheet or a script of ours, as it is."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def _image(path: Path) -> str | None:
    return data_uri("image/png", path.read_bytes()) if path.exists() else None


def _script_json(value: Any) -> Markup:
    """JSON that is safe inside a <script> element: no `<`, `>` or `&` survives, whatever a model answered."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
