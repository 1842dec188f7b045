"""The page of a sweep, or of several side by side: every metric and cell as mean and 95 % interval over its runs."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mcit.data_prep.files import atomic_open

from ..sweep import Matrix, read_sweep
from .heatmaps import write_matrix_image
from .words import METRICS, shown


def write_sweep_report(paths: list[Path], out: Path) -> Path:
    """Write `index.html` and `matrix.png` (the means) into the folder `out`; returns the page's path.

    A run among `paths` counts as a sweep of one. Raises `InputError` for a directory without `results.json`.
    """
    sweeps = [read_sweep(path) for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    matrices = [(sweep["name"], matrix) for sweep in sweeps for matrix in sweep["matrices"]]
    write_matrix_image([_means(name, matrix) for name, matrix in matrices], out / "matrix.png")
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    names = {metric for sweep in sweeps for metric in sweep["metrics"]}
    page = environment.get_template("sweep.html.j2").render(
        title=" · ".join(sweep["name"] for sweep in sweeps),
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        sweeps=sweeps,
        metrics={metric: meaning for metric, meaning in METRICS.items() if metric in names},
        shown=shown,
    )
    with atomic_open(out / "index.html") as file:
        file.write(page)
    return out / "index.html"


def _means(name: str, matrix: Matrix) -> dict[str, Any]:
    """The means of a matrix in the form of a run's results."""
    cells = [[cell and cell["mean"] for cell in row] for row in matrix["cells"]]
    title = name if matrix["order"] is None else f"{name}, {matrix['order']}"
    return {"name": title, "matrix": cells, **{key: matrix[key] for key in ("tasks", "stages", "learned")}}
