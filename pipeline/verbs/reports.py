"""What `mcit report` prints and writes: of one run or sweep, or of several against each other."""

from collections.abc import Sequence
from pathlib import Path

from mcit.data_prep.files import write_json
from mcit.eval.compare import Comparison, compare_members, compare_runs
from mcit.eval.report.page import write_report
from mcit.eval.report.sweep import write_sweep_report
from mcit.eval.report.words import old_task_verdicts, shown, signed
from mcit.eval.results import read_results
from mcit.eval.sweep import SweepResults, is_sweep, read_sweep

from ..run.terminal import Terminal


def report(paths: Sequence[Path], out: Path | None, terminal: Terminal) -> None:
    """Write the page and print what it says; several are set side by side, each against the first.

    `out` is the folder to write to; by default `report/` in the run, of several beside the first. Where there is a
    sweep among them, runs count as sweeps of one. Raises `InputError`.
    """
    out = out or (paths[0].resolve().parent if len(paths) > 1 else paths[0]) / "report"
    page = (_report_sweeps if any(map(is_sweep, paths)) else _report_runs)(paths, out, terminal)
    terminal.say(f"report: {page}")


def _report_runs(paths: Sequence[Path], out: Path, terminal: Terminal) -> Path:
    results = [dict(read_results(path)) for path in paths]
    differences = {place: compare_runs(paths[0], path) for place, path in enumerate(paths[1:], 1)}
    page = write_report(paths, out, differences)
    for result in results:
        terminal.results(result, old_task_verdicts(result))
    if len(paths) > 1:
        terminal.compare([str(path) for path in paths], results)
        comparisons = {str(paths[place]): comparison for place, comparison in differences.items()}
        write_json(out / "comparison.json", {"first": str(paths[0]), "others": comparisons})
        for name, comparison in comparisons.items():
            _show_comparison(f"{name} minus {paths[0]}, paired by sample", comparison, terminal)
    return page


def _report_sweeps(paths: Sequence[Path], out: Path, terminal: Terminal) -> Path:
    sweeps = [read_sweep(path) for path in paths]
    page = write_sweep_report(list(paths), out)
    names = dict.fromkeys(metric for sweep in sweeps for metric in sweep["metrics"])
    rows = [[metric, *(shown(sweep["metrics"].get(metric)) for sweep in sweeps)] for metric in names]
    columns = [f"{path} ({len(sweep['runs'])})" for path, sweep in zip(paths, sweeps, strict=True)]
    terminal.table("mean over (runs) ± half of its 95 % interval", ["metric", *columns], rows)
    if len(paths) > 1:
        first, *others = map(_metrics, sweeps)
        comparisons = {str(path): compare_members(first, other) for path, other in zip(paths[1:], others, strict=True)}
        write_json(out / "comparison.json", {"first": str(paths[0]), "others": comparisons})
        for name, differences in comparisons.items():
            lines = [(metric, signed(found, "mean"), found["n"]) for metric, found in differences.items()]
            if lines:
                title = f"{name} minus {paths[0]}, paired by seed and order"
                terminal.table(title, ["metric", "difference, 95 % interval", "pairs"], lines)
    return page


def _metrics(sweep: SweepResults) -> dict[str, dict[str, float | None]]:
    return {run["name"]: run["metrics"] for run in sweep["runs"]}


def _show_comparison(title: str, comparison: Comparison, terminal: Terminal) -> None:
    known = {**comparison["tasks"], "MFN": comparison["MFN"], "BWT": comparison["BWT"]}
    lines = [(name, signed(found), found["n"]) for name, found in known.items() if found]
    if lines:
        terminal.table(title, ["after the last stage", "difference, 95 % interval", "samples"], lines)
