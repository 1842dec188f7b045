"""Any module may be the first that a process imports: no circle of imports works only when it is entered elsewhere."""

import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STARTED = ("mcit.pipeline.cli", "mcit.pipeline.sft", "mcit.pipeline.rft", "mcit.eval.evaluate")  # as processes, by name


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that have imported everything from elsewhere, as that takes long."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(STARTED))
    return found


def alone(module: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mcit"]:
        del sys.modules[name]
    importlib.import_module(module)


def modules(folder: str) -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / folder).rglob("*.py"))]
    return ["mcit." + ".".join(path.parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(STARTED, id="started"),
        *(
            pytest.param(modules(folder), id=folder, marks=pytest.mark.slow)
            for folder in ("pipeline", "data_prep", "eval", "slurm")
        ),
    ],
)
def test_each_can_be_imported_first(context: Any, names: list[str]) -> None:
    failed = []
    for name in names:
        process = context.Process(target=alone, args=(name,))
        process.start()
        process.join()
        failed += [name] if process.exitcode else []
    assert not failed
