"""What a run says while it works: one line a step, and where a long step is."""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .disk import size

_REMARK = re.compile(r"^(\[|/|[A-Z]\d{4} |Loading |Triton )|[Ww]arn")
SILENCE = 30.0  # seconds between progress lines where nothing can be overwritten


class Terminal:
    """Prints to a terminal with colour and a live line, elsewhere in plain lines."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        self.console.print(Text(text, style))

    @contextlib.contextmanager
    def working(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show that `title` is at work; yields a function that shows the latest line of its progress."""
        if self.console.is_terminal:
            with self.console.status(Text(title)) as status:
                width = max(20, self.console.width - len(title) - 8)

                def update(line: str) -> None:
                    if progress := condensed(line):
                        status.update(Text.assemble(title, "  ", (progress[:width], "dim")))

                yield update
            return
        last = time.monotonic()

        def show(line: str) -> None:
            nonlocal last
            if time.monotonic() - last > SILENCE and (progress := condensed(line)):
                last = time.monotonic()
                self.say(f"  … {title}: {progress[:160]}")

        yield show

    def finished(self, title: str, seconds: float | None, *details: str) -> None:
        """A step's line: done in `seconds`, or (None) kept from before; a short detail goes on it, more lines below."""
        inline = details[0] if details else ""
        self.console.print(
            Text.assemble(
                ("✓ ", "green") if seconds is not None else ("= ", "dim"),
                title,
                (f"  {seconds:.1f} s" if seconds is not None else "  nothing to do", "dim"),
                (f"  {inline}" if inline else "", "dim"),
            )
        )
        for line in details[1:]:
            self.say(f"    {line}", "dim")

    def results(self, results: Mapping[str, Any], old: Mapping[str, float] | None) -> None:
        """The matrix (rows stages, columns tasks, [] where a task was learned), metrics and verdicts on old tasks."""
        table = self._table(f"{results['name']}: score after each stage")
        table.add_column("after stage")
        for task in results["tasks"]:
            table.add_column(task["name"], justify="right")
        for stage, row in zip(results["stages"], results["matrix"], strict=True):
            cells = [
                _cell(score, results["learned"][task["name"]] == stage["k"])
                for task, score in zip(results["tasks"], row, strict=True)
            ]
            table.add_row(f"{stage['k']} {stage['name']}", *cells)
        self.console.print(table)
        metrics = results["metrics"]
        known = [f"{name} {metrics[name]:.1f}" for name in ("MFT", "MFN", "BWT") if metrics.get(name) is not None]
        if known:
            self.say("   ".join(known))
        if old:
            shares = ", ".join(f"{100 * share:.0f} % {verdict}" for verdict, share in old.items())
            self.say(f"old tasks after the last stage: {shares}")
        if split := results.get("forgetting", {}).get("mean"):
            loss, essential, superficial = (split[part]["value"] for part in ("loss", "essential", "superficial"))
            self.say(f"lost above chance {loss:.1f}: {essential:.1f} essential, {superficial:.1f} superficial")
        if reasoning := results.get("reasoning"):
            self._reasoning(results, reasoning)
        if (general := metrics.get("general")) is not None:
            before = metrics.get("general_base")
            self.say(f"general {general:.1f}" + (f", of the base {before:.1f}" if before is not None else ""))

    def _reasoning(self, results: Mapping[str, Any], reasoning: Mapping[str, Any]) -> None:
        """Mean reasoning scores, what was lost of them beside the answers, and what has no score."""
        known = [
            f"{name} {value:.1f}"
            for name, value in results["metrics"].items()
            if name.startswith("reasoning_") and value is not None
        ]
        if known:
            self.say("   ".join(known))
        if lost := reasoning["mean"]:
            values = [lost[part]["value"] for part in ("reasoning", "answer")]
            self.say("lost since learned, earlier tasks: reasoning {:.1f}, answers {:.1f}".format(*values))
        outcomes = Counter[str]()
        for cell in (cell for row in reasoning["outcomes"] for cell in row if cell):
            outcomes.update(cell)
        missing = [f"{outcomes[key]} {key}" for key in ("cut", "unreadable", "refused") if outcomes[key]]
        if missing:
            self.say(f"reasoning without a score: {', '.join(missing)} of {outcomes.total()}", "yellow")

    def status(self, status: Mapping[str, Any]) -> None:
        """What is done, running and left: a line a step, with its SLURM job; of a sweep a line a run."""
        for name, run in status.get("runs", {}).items():
            done = sum(step["state"] == "done" for step in run["steps"])
            line = f"{run['state']:8}{name}  {done} of {len(run['steps'])} steps  {run['seconds']:.1f} s"
            jobs = Counter(job["state"] for job in run["jobs"] if job["state"] not in (None, "COMPLETED"))
            counted = ", ".join(f"{count} {state}" for state, count in sorted(jobs.items()))
            self.say(f"{line}  jobs: {counted}" if counted else line, "" if run["state"] == "done" else "bold")
        beside = {step: _job(job) for job in status["jobs"] for step in job["steps"]}
        for step in status.get("steps", ()):
            owner = step["owner"]
            by = f"  process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else ""
            seconds = f"  {step['seconds']:.1f} s" if step["seconds"] is not None else ""
            job = f"  {beside[step['name']]}" if step["name"] in beside and step["state"] != "done" else ""
            more = _progress(step["progress"], bool(owner)) if step["progress"] else ""
            more = _cost(step["cost"]) if step["cost"] else more
            line = f"{step['state']:8}{step['title']}{seconds}{more}{by}{job}"
            self.say(line, "" if step["state"] == "done" else "bold")
        for job in status["jobs"]:
            if not job["steps"]:
                self.say(f"{'':8}{job['name']}  {_job(job)}")
        if status["remark"]:
            self.say(status["remark"], "yellow")

    def compare(self, names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
        """Several runs side by side: a row a metric, a column a run."""
        table = self._table("side by side")
        table.add_column("metric")
        for name in names:
            table.add_column(name, justify="right")
        for metric in dict.fromkeys(metric for result in results for metric in result["metrics"]):
            values = [result["metrics"].get(metric) for result in results]
            if any(value is not None for value in values):
                table.add_row(metric, *(_cell(value) for value in values))
        self.console.print(table)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; a column of figures is set flush right, and nothing stands where there is nothing (None)."""
        table = self._table(title)
        for index, column in enumerate(columns):
            figures = all(isinstance(row[index], int | None) for row in rows)
            table.add_column(column, justify="right" if figures else "left")
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row))
        self.console.print(table)

    def _table(self, title: str) -> Table:
        return Table(title=title, title_justify="left", box=box.SIMPLE if self.console.is_terminal else box.ASCII2)


def condensed(line: str) -> str | None:
    """A child's line as progress: loss and epoch of a trainer's log, nothing of what libraries merely remark."""
    if line.startswith("{'"):
        logged = dict(re.findall(r"'(\w+)': '?([^',}]+)", line))
        return "  ".join(f"{key} {logged[key]}" for key in ("loss", "reward", "epoch") if key in logged) or None
    return None if _REMARK.search(line) else line


def _progress(progress: Mapping[str, Any], running: bool) -> str:
    """How far a stage is."""
    step = f"  {'step' if running else 'stopped at step'} {progress['step']} of {progress['steps']}"
    loss = f", loss {progress['loss']:.4g}" if progress["loss"] is not None else ""
    left = f", {_duration(progress['left'])} left" if running and progress["left"] is not None else ""
    return step + loss + left


def _cost(cost: Mapping[str, Any]) -> str:
    """What a stage has cost."""
    hours = f"{cost['gpu_hours']:.3g} GPU hours" if cost["gpu_hours"] else f"{cost['process_hours']:.3g} process hours"
    peaks = [
        f"{size(cost[key])} {where}"
        for key, where in (("peak_gpu_bytes", "GPU"), ("peak_host_bytes", "RAM"))
        if cost[key]
    ]
    return f"  {hours}, {cost['tokens']:,} tokens, at most {', '.join(peaks)}"


def _duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _job(job: Mapping[str, Any]) -> str:
    """A SLURM job: its id, its state, and what there is to say of it."""
    note = f"({job['note']})" if job["note"] else None
    return " ".join(filter(None, ("job", job["id"], job["state"], note)))


def _cell(score: float | None, learned: bool = False) -> Text:
    if score is None:
        return Text("–", "dim")
    return Text(f"[{score:.1f}]", "bold green") if learned else Text(f"{score:.1f}")
