"""The board of methods on the mini stream: run what of it is not there yet, and make its page.

    python benchmarks/leaderboard/board.py run [METHOD…] [--most 4] [--runs runs/leaderboard]
    python benchmarks/leaderboard/board.py page

`board.yaml` says what belongs to it. A finished run leaves a record in `<base>/<method>/` beside it, and what has one
is not run again; a run that was stopped goes on where it was. `run` may be started several times at once: no run is
done twice. `page` writes `docs/leaderboard.md` from the records alone.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open, read_text, write_json
from mcit.eval.leaderboard.comparisons import Board
from mcit.eval.leaderboard.records import make_record, read_records
from mcit.eval.leaderboard.tables import KEEPS, tables
from mcit.pipeline.methods import get_method
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.orders import members
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.recipe.text import parse_yaml
from mcit.pipeline.run.child import ChildFailed
from mcit.pipeline.run.doctor import gpu_gib
from mcit.pipeline.run.locks import locked
from mcit.pipeline.run.preemption import EXIT_CODE, Preempted, preemptible
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "leaderboard.md"


class Entry(NamedTuple):
    """One run of the board."""

    base: str
    model: str  # its folder, from the repository's
    method: str
    asked: Mapping[str, Any]  # what the board says of the method
    keys: Sequence[str]  # of the recipe, that are changed
    order: str | None  # None: the stream's own
    seed: int

    @property
    def name(self) -> Path:
        """Its folder below that of the runs; with `.json`, its record below the folder of the records."""
        seed = f"seed-{self.seed}"
        return Path(self.base, self.method, seed if self.order is None else f"{self.order}-{seed}")

    def recipe(self) -> Recipe:
        """What is run. Raises `InputError`."""
        orders = [] if self.order is None else [f"sweep.order=[mini/{self.order}]"]
        own = [f"base_model.path={ROOT / self.model}", f"sweep.seed=[{self.seed}]", *orders]
        recipe, fragments = self.asked.get("recipe", "mini/sequential"), self.asked.get("with", ())
        [member] = members(load_recipe(recipe, [*own, *self.keys], fragments))
        return member.recipe


def read_board() -> dict[str, Any]:
    """What belongs to the board."""
    board: dict[str, Any] = parse_yaml(read_text(HERE / "board.yaml"), "board.yaml")
    return board


def entries(board: Mapping[str, Any]) -> list[Entry]:
    """Every run of the board, in the order in which they are run: seed after seed, so that no method is ahead."""
    bases, found = list(board["bases"].items()), []
    for at, seed in enumerate(board["seeds"]):
        for number, order in enumerate(board["orders"]):
            for method, asked in board["methods"].items():
                bound, first = "bound" in asked, at == number == 0
                if first or (asked.get("main") and not (bound and number)):
                    keys = [*board["all"], *asked.get("set", ())]
                    for base, model in bases if asked.get("main") else bases[:1]:
                        found.append(Entry(base, model, method, asked, keys, None if bound else order, seed))
    return found


def run(options: argparse.Namespace) -> int:
    """Do the runs that have no record, as many as were asked for; the exit code."""
    board, terminal = read_board(), Terminal()
    launch = Launch.named(options.launch or ("fork" if gpu_gib() is None else "single"))
    if unknown := set(options.methods) - set(board["methods"]):
        remedy = f"It has {', '.join(board['methods'])}"
        raise InputError(f"has no method {min(unknown)}", where=HERE / "board.yaml", remedy=remedy)
    wanted = [entry for entry in entries(board) if entry.method in (options.methods or board["methods"])]
    left = [entry for entry in wanted if not _record(options.records, entry).exists()]
    terminal.say(f"{len(wanted) - len(left)} of {len(wanted)} runs are done")
    done = failed = 0
    for entry in left:
        if options.most is not None and done >= options.most:
            break
        lock = options.runs / entry.name / "board.lock"
        try:
            with locked(lock, str(entry.name)):
                if not _record(options.records, entry).exists():  # another process may have done it meanwhile
                    terminal.say(str(entry.name), "bold")
                    _run(entry, options, launch, terminal)
                    done += 1
        except (InputError, ChildFailed) as error:  # the others are run all the same
            terminal.say(f"{entry.name}: {error}", "yellow")
            failed += getattr(error, "where", None) != str(lock)
    return 1 if failed else 0


def _run(entry: Entry, options: argparse.Namespace, launch: Launch, terminal: Terminal) -> None:
    """Do a run, or what is left of it, and write its record. Raises `InputError` and `ChildFailed`."""
    recipe, folder = entry.recipe(), options.runs / entry.name
    current = start_run(recipe, folder, launch, terminal)
    perform_steps(current, [step for step in current.steps() if step.name != "report"], terminal)
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
    planned = Counter(entry.method for entry in entries(board))
    found = tables(Board(read_records(records)), planned, bounds, published)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.md.j2").render(board=board, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE, help="folder of the records")
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("methods", nargs="*", metavar="METHOD", help="default: all of the board")
    runs.add_argument("--most", type=int, help="end after so many runs")
    runs.add_argument("--runs", type=Path, default=Path("runs") / "leaderboard", help="folder of the runs")
    runs.add_argument("--launch", help="as of `mcit run`; default: fork, with a GPU single")
    runs.set_defaults(do=run)
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
