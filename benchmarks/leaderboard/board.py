"""The board of methods on the mini stream: run what of it is not there yet, and make its page.

    python benchmarks/leaderboard/board.py search [METHOD…] [--most 4] [--runs runs/leaderboard]
    python benchmarks/leaderboard/board.py run [METHOD…] [--most 4] [--runs runs/leaderboard]
    python benchmarks/leaderboard/board.py page

`board.yaml` says what belongs to it. `search` chooses each method's settings on another stream (`search.py`), `run`
does the runs with them. Either leaves a record beside it, in `search/` or `<base>/<method>/`, and what has one is not
run again; what was stopped goes on where it was. Both may be started several times at once: no run is done twice.
`page` writes `docs/leaderboard.md` from the records alone.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from runs import HERE, ROOT, Entry, entries, perform, read_board
from search import choices, rows, search_record, try_all

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open, read_text, write_json
from mcit.eval.leaderboard.comparisons import Board
from mcit.eval.leaderboard.records import make_record, read_records
from mcit.eval.leaderboard.tables import KEEPS, tables
from mcit.pipeline.methods import get_method
from mcit.pipeline.recipe.text import parse_yaml
from mcit.pipeline.run.child import ChildFailed
from mcit.pipeline.run.doctor import gpu_gib
from mcit.pipeline.run.locks import locked
from mcit.pipeline.run.preemption import EXIT_CODE, Preempted, preemptible
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

PAGE = ROOT / "docs" / "leaderboard.md"


def search(options: argparse.Namespace) -> int:
    """Do the searches that have no record, as many as were asked for; the exit code."""
    board = read_board()
    tasks = [
        Task(
            f"search/{method}",
            search_record(options.records, method),
            partial(try_all, board, method, options.records, options.runs, *_how(options)),
        )
        for method in _wanted(board, options)
        if not board["methods"][method].get("fixed")
    ]
    return _do(tasks, options)


def run(options: argparse.Namespace) -> int:
    """Do the runs that have no record, as many as were asked for; the exit code."""
    board = read_board()
    wanted, chosen = _wanted(board, options), choices(board, options.records)
    tasks = [
        Task(str(entry.name), _record(options.records, entry), partial(_run, entry, chosen, options))
        for entry in entries(board, chosen)
        if entry.method in wanted
    ]
    return _do(tasks, options)


def _wanted(board: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    if unknown := set(options.methods) - set(board["methods"]):
        remedy = f"It has {', '.join(board['methods'])}"
        raise InputError(f"has no method {min(unknown)}", where=HERE / "board.yaml", remedy=remedy)
    return [method for method in board["methods"] if method in (options.methods or board["methods"])]


class Task(NamedTuple):
    """Something to do once."""

    name: str
    record: Path  # what is there when it is done
    do: Callable[[], None]


def _do(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Do what has no record and is not done by another process; the exit code."""
    terminal, done, failed = Terminal(), 0, 0
    left = [task for task in tasks if not task.record.exists()]
    terminal.say(f"{len(tasks) - len(left)} of {len(tasks)} are done")
    for task in left:
        if options.most is not None and done >= options.most:
            break
        lock = options.runs / task.name / "board.lock"
        try:
            with locked(lock, task.name):
                if not task.record.exists():  # another process may have done it meanwhile
                    terminal.say(task.name, "bold")
                    task.do()
                    done += 1
        except (InputError, ChildFailed) as error:  # the others are done all the same
            terminal.say(f"{task.name}: {error}", "yellow")
            failed += getattr(error, "where", None) != str(lock)
    return 1 if failed else 0


def _how(options: argparse.Namespace) -> tuple[Launch, Terminal]:
    return Launch.named(options.launch or ("fork" if gpu_gib() is None else "single")), Terminal()


def _run(entry: Entry, chosen: Container[str], options: argparse.Namespace) -> None:
    """Do a run, or what is left of it, and write its record. Raises `InputError` and `ChildFailed`."""
    if entry.method not in chosen:
        missing = search_record(options.records, entry.method)
        raise InputError("is missing", where=missing, remedy=f"Choose settings: board.py search {entry.method}")
    recipe, folder = entry.recipe(), options.runs / entry.name
    perform(recipe, folder, *_how(options))
    keeps = max((get_method(name).keeps for name in recipe.method), key=KEEPS.index, default=KEEPS[0])
    record = make_record(
        folder,
        base=entry.base,
        method=entry.method,
        order=entry.order,
        keeps=keeps,
        train={"lineage": recipe.train.lineage, "learning_rate": recipe.train.sft.args["learning_rate"]},
    )
    write_json(_record(options.records, entry), record)


def _record(records: Path, entry: Entry) -> Path:
    return records / entry.name.with_name(f"{entry.name.name}.json")


def page(options: argparse.Namespace) -> int:
    """Write the page from the records."""
    with atomic_open(options.page) as file:
        file.write(rendered(options.records))
    return 0


def rendered(records: Path) -> str:
    """The page, of all records that belong to the board."""
    board, published = read_board(), parse_yaml(read_text(HERE / "published.yaml"), "published.yaml")
    bounds = {method: asked["bound"] for method, asked in board["methods"].items() if "bound" in asked}
    planned = Counter(entry.method for entry in entries(board, {}))
    found = tables(Board(read_records(records)), planned, bounds, published)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.md.j2").render(board=board, searches=list(rows(board, records)), **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE, help="folder of the records")
    verbs = parser.add_subparsers(required=True)
    for name, do, what in (("search", search, "searches"), ("run", run, "runs")):
        verb = verbs.add_parser(name)
        verb.add_argument("methods", nargs="*", metavar="METHOD", help="default: all of the board")
        verb.add_argument("--most", type=int, help=f"end after so many {what}")
        verb.add_argument("--runs", type=Path, default=Path("runs") / "leaderboard", help="folder of the runs")
        verb.add_argument("--launch", help="as of `mcit run`; default: fork, with a GPU single")
        verb.set_defaults(do=do)
    made = verbs.add_parser("page")
    made.add_argument("--page", type=Path, default=PAGE)
    made.set_defaults(do=page)
    options = parser.parse_args()
    try:
        with preemptible():
            sys.exit(options.do(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
