"""The tables of a board's page, as plain text cells: who is in them, in which order, and what is said of each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ..report.words import shown, signed
from ..stats import mean
from .comparisons import METRICS, Board
from .records import Record

KEEPS = ("nothing", "general data", "past data")  # what a method may keep, the most last


class Row(TypedDict):
    """A method's line."""

    rank: str  # among those that keep the same, of the ones that were run often enough; shared
    method: str
    lineage: str
    n: str  # runs there are, of those that are planned
    figures: list[str]  # of `METRICS`
    time: str  # of training, over that of what it is compared with
    memory: str  # beyond that, MiB at the peak
    state: str  # handed on after the last stage, KiB
    engines: str


class Versus(TypedDict):
    """A method against sequential tuning under its lineage."""

    method: str
    other: str
    differences: list[str]  # of AP and BWT
    p: str  # of AP, corrected
    n: int  # (base, seed) pairs that both have


class Agreement(TypedDict):
    """The board's order against a published one."""

    name: str
    source: str
    methods: str
    tau: str
    p: str


class Tables(TypedDict):
    """What a page shows."""

    runs: int
    planned: int
    metrics: list[str]
    groups: dict[str, list[Row]]  # by what is kept
    bounds: list[tuple[str, str, str, str]]  # what, runs, which figure, the figure
    versus: list[Versus]
    bases: dict[str, dict[str, str]]  # AP by method and base, where there are several
    agreements: list[Agreement]
    engines: list[str]
    versions: list[str]


def tables(
    board: Board,
    planned: Mapping[str, int],
    bounds: Mapping[str, str],
    published: Iterable[Mapping[str, Any]],
) -> Tables:
    """Everything that a page shows. `planned` has the runs that each method is to have, in the order of the board,
    `bounds` the one figure that a bound is read by."""
    methods = [method for method in planned if method not in bounds and board.runs(method)]
    engines = sorted({engine for record in board.records for engine in record["engines"]})
    versions = {f"{name} {found}" for record in board.records for name, found in record["versions"].items()}
    return {
        "runs": len(board.records),
        "planned": sum(planned.values()),
        "metrics": list(METRICS),
        "groups": {kept: group for kept in KEEPS if (group := _group(board, methods, kept, planned))},
        "bounds": [_bound(board, method, metric, planned) for method, metric in bounds.items()],
        "versus": _versus(board, methods),
        "bases": _by_base(board, methods),
        "agreements": [found for study in published if (found := _agreement(board, study))],
        "engines": engines,
        "versions": sorted(versions),
    }


def _records(board: Board, method: str) -> list[Record]:
    return [board.records[place] for place in board.runs(method).values()]


def _against(board: Board, method: str) -> str:
    """Sequential tuning under the same lineage. What merges independent adapters has none of its own."""
    continues = _records(board, method)[0]["train"]["lineage"] == "continue"
    return "sequential_continue" if continues and method != "sequential_continue" else "sequential"


def _group(board: Board, methods: Sequence[str], kept: str, planned: Mapping[str, int]) -> list[Row]:
    """The methods that keep `kept`, best first; those of a single run after the ranked ones."""
    group = [method for method in methods if _records(board, method)[0]["keeps"] == kept]
    often = [method for method in group if _units(board, method) > 1]
    ranks = board.ranks(often)

    def key(method: str) -> tuple[bool, int, float]:
        found = board.mean(method, "AP")
        return method not in ranks, ranks.get(method, 0), -found["mean"] if found else 0.0

    return [_row(board, method, ranks.get(method), planned[method]) for method in sorted(group, key=key)]


def _units(board: Board, method: str) -> int:
    return len({(base, seed) for base, _, seed in board.runs(method)})


def _row(board: Board, method: str, rank: int | None, planned: int) -> Row:
    records, other = _records(board, method), _against(board, method)
    time, memory = _costs(board, method, other)
    return {
        "rank": "–" if rank is None else str(rank),
        "method": method,
        "lineage": records[0]["train"]["lineage"],
        "n": f"{len(records)}/{planned}",
        "figures": [shown(board.mean(method, metric)) for metric in METRICS],
        "time": time,
        "memory": memory,
        "state": f"{mean([record['state_bytes'] for record in records]) / 1024:.0f}",
        "engines": ", ".join(sorted({engine for record in records for engine in record["engines"]})),
    }


def _costs(board: Board, method: str, other: str) -> tuple[str, str]:
    """Training time and memory at the peak beside what the method is compared with, over the runs that both have."""
    mine, theirs = board.runs(method), board.runs(other)
    pairs = [(board.records[mine[key]], board.records[theirs[key]]) for key in mine if key in theirs]
    times = [a["train_seconds"] / b["train_seconds"] for a, b in pairs if a["train_seconds"] and b["train_seconds"]]
    peaks = [a["peak_bytes"] - b["peak_bytes"] for a, b in pairs if a["peak_bytes"] and b["peak_bytes"]]
    return f"{mean(times):.2f} ×" if times else "–", f"{mean(peaks) / 2**20:+.0f}" if peaks else "–"


def _bound(board: Board, method: str, metric: str, planned: Mapping[str, int]) -> tuple[str, str, str, str]:
    found = board.mean(method, metric) if board.runs(method) else None
    return method, f"{len(board.runs(method))}/{planned[method]}", metric, shown(found)


def _versus(board: Board, methods: Sequence[str]) -> list[Versus]:
    """Every method against sequential tuning; the corrected p-values are of the differences in AP, all together."""
    pairs = [(method, other) for method in methods if method != (other := _against(board, method))]
    scores, changes = board.differences(pairs), board.differences(pairs, "BWT")
    return [
        {
            "method": method,
            "other": other,
            "differences": ["–" if one is None else signed(one.interval, "mean") for one in (score, change)],
            "p": "–" if score.p is None else f"{score.p:.3f}" if score.p >= 0.001 else "< 0.001",
            "n": score.interval["n"],
        }
        for (method, other), score, change in zip(pairs, scores, changes, strict=True)
        if score
    ]


def _by_base(board: Board, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    names = sorted({record["base"] for record in board.records})
    if len(names) < 2:
        return {}
    boards = {name: Board([record for record in board.records if record["base"] == name]) for name in names}
    return {method: {name: shown(one.mean(method, "AP")) for name, one in boards.items()} for method in methods}


def _agreement(board: Board, study: Mapping[str, Any]) -> Agreement | None:
    found = board.agreement(study["scores"])
    if found is None:
        return None
    tau, p, methods = found
    order = sorted(methods, key=lambda method: -study["scores"][method])
    return {
        "name": study["name"],
        "source": study["source"],
        "methods": " > ".join(order),
        "tau": f"{tau:+.2f}",
        "p": f"{p:.2f}",
    }
