"""What is run for the board: which runs belong to it, and how one is made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mcit.data_prep.files import read_text
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.orders import members
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.recipe.text import parse_yaml
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Entry(NamedTuple):
    """One run."""

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


def entries(board: Mapping[str, Any], chosen: Mapping[str, Sequence[str]]) -> list[Entry]:
    """Every run of the board, in the order in which they are run: seed after seed, so that no method is ahead.

    `chosen` has the keys that were chosen for methods.
    """
    bases, found = list(board["bases"].items()), []
    for at, seed in enumerate(board["seeds"]):
        for number, order in enumerate(board["orders"]):
            for method, asked in board["methods"].items():
                bound, first = "bound" in asked, at == number == 0
                if first or (asked.get("main") and not (bound and number)):
                    keys = [*board["all"], *asked.get("set", ()), *chosen.get(method, ())]
                    for base, model in bases if asked.get("main") else bases[:1]:
                        found.append(Entry(base, model, method, asked, keys, None if bound else order, seed))
    return found


def perform(recipe: Recipe, folder: Path, launch: Launch, terminal: Terminal) -> None:
    """Do a run, or what is left of it, but for the report. Raises `InputError` and `ChildFailed`."""
    current = start_run(recipe, folder, launch, terminal)
    perform_steps(current, [step for step in current.steps() if step.name != "report"], terminal)
