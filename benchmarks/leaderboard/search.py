"""Learning rate and knob of every method, chosen on a stream that is not the board's, with as many trials for each."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

from runs import Entry, perform

from mcit.data_prep.files import read_json, write_json
from mcit.eval.results import read_results
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal


class Trial(TypedDict):
    """One setting of a method, and how it did. Scores are 0–100."""

    keys: list[str]  # of the recipe
    AP: float
    MFT: float
    BWT: float | None  # None: a single stage


class Search(TypedDict):
    """All trials of a method; the one with the highest `figure` is chosen, of equals the first."""

    figure: str
    trials: list[Trial]


def settings(search: Mapping[str, Any], asked: Mapping[str, Any]) -> list[list[str]]:
    """What is tried of a method, what its recipe says first: learning rates, and with each the values of its knob."""
    if asked.get("fixed"):
        return []
    knob: Mapping[str, Sequence[Any]] = asked.get("knob", {})
    rates = asked.get("rates", search["rates" if knob else "rates_alone"])
    tried = {"train.sft.args.learning_rate": rates, **knob}
    return [[f"{key}={value}" for key, value in zip(tried, values, strict=True)] for values in product(*tried.values())]


def trials(board: Mapping[str, Any], method: str) -> Iterator[tuple[list[str], Entry]]:
    """Settings of a method, and the run that tries them."""
    asked, search = board["methods"][method], board["search"]
    base, model = next(iter(board["bases"].items()))
    for keys in settings(search, asked):
        every = [*search["all"], *asked.get("set", ()), *keys]
        yield keys, Entry(base, model, method, asked, every, None, search["seed"])


def try_all(
    board: Mapping[str, Any], method: str, records: Path, runs: Path, launch: Launch, terminal: Terminal
) -> None:
    """Do the trials of a method that are left, and record them all. Raises `InputError` and `ChildFailed`."""
    done = list[Trial]()
    for number, (keys, entry) in enumerate(trials(board, method), 1):
        terminal.say(f"search {method} {number}: {' '.join(keys)}", "bold")
        folder = runs / "search" / method / f"{number}"
        perform(entry.recipe(), folder, launch, terminal)
        metrics = {name: read_results(folder)["metrics"].get(name) for name in ("AP", "MFT", "BWT")}
        rounded = {name: value if value is None else round(value, 2) for name, value in metrics.items()}
        done.append({"keys": keys, **rounded})
    write_json(search_record(records, method), Search(figure=board["methods"][method].get("bound", "AP"), trials=done))


def search_record(records: Path, method: str) -> Path:
    """Where a method's search is recorded."""
    return records / "search" / f"{method}.json"


def read_searches(board: Mapping[str, Any], records: Path) -> dict[str, Search]:
    """The searches that are done, by method."""
    return {method: read_json(path) for method in board["methods"] if (path := search_record(records, method)).exists()}


def best(found: Search) -> Trial:
    """The trial that is chosen."""
    return max(found["trials"], key=lambda trial: trial[found["figure"]])


def choices(board: Mapping[str, Any], records: Path) -> dict[str, Sequence[str]]:
    """The keys that were chosen, of the methods that have been searched or have nothing to choose."""
    fixed = {method: [] for method, asked in board["methods"].items() if asked.get("fixed")}
    return fixed | {method: best(found)["keys"] for method, found in read_searches(board, records).items()}


def rows(board: Mapping[str, Any], records: Path) -> Iterator[list[str]]:
    """Every trial as a row of the page: method, setting, AP, MFT, BWT, and whether it was chosen."""
    for method, found in read_searches(board, records).items():
        chosen = best(found)
        for trial in found["trials"]:
            setting = ", ".join(_short(key) for key in trial["keys"])
            scores = ["–" if (value := trial[name]) is None else f"{value:.1f}" for name in ("AP", "MFT", "BWT")]
            yield [method, setting, *scores, "chosen" if trial is chosen else ""]


def _short(key: str) -> str:
    """`train.sft.args.learning_rate=0.001` → `learning_rate 0.001`."""
    path, _, value = key.partition("=")
    return f"{path.rpartition('.')[2]} {value}"
