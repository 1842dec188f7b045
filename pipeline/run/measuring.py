"""The steps that score: the answers of every policy, and the reasoning in them where a judge is named."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable

from mcit.data_prep.files import read_json, write_json
from mcit.eval.cells import load_cell, needed_cells
from mcit.eval.engines import FALLBACK
from mcit.eval.hashing import cache_dir
from mcit.eval.judge.cells import JudgedCell, judge_cells, judged_cells
from mcit.eval.judge.judges import judge_identity
from mcit.eval.serving import read_serving

from .inputs import hashes_of_test_sets
from .step import Facts, Show, Step
from .tuning import Tuning

# What evaluation imports at work, as far as it takes time; what is not installed is passed over.
_ENGINES = (
    "mcit.eval.engines.vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "mcit.eval.cells",
    "mcit.eval.engines.transformers",
    "mcit.eval.liveness",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.tokenization_mistral_common",
    "peft",
)


class Measuring(Tuning):
    """A run's steps up to the last cell of its matrix."""

    def rows(self) -> list[int]:
        """The stages of which something is evaluated, 0 being the base."""
        return sorted({k for k, _ in self._needed_cells()})

    def _needed_cells(self) -> list[tuple[int, str]]:
        general = tuple(task.name for task in self.recipe.eval.general)
        return needed_cells(self.recipe.eval.cells, len(self.recipe.stages), self.recipe.learned, general)

    def evaluate(self, partly: bool = False, row: int | None = None) -> Step:
        """All cells that are needed (`partly`: of the stages that are done; or of one, `row`), in one process."""
        config, training = self.recipe.eval, self.training()
        name = "evaluate" if row is None else f"evaluate/{row}"

        def cells() -> list[tuple[int, str]] | None:
            done = [k for k, step in enumerate([self.check(), *training]) if step.done()]
            wanted = [cell for cell in self._needed_cells() if row in (None, cell[0])]
            return [cell for cell in wanted if cell[0] in done] if partly or {k for k, _ in wanted} <= {*done} else None

        def left(wanted: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
            return [cell for cell in wanted if not load_cell(self.dir, *cell, config).is_done()]

        def inputs() -> Facts | None:
            wanted = cells()
            if not wanted:
                return None
            return {
                "cells": [list(cell) for cell in wanted],
                # General tasks are among the cells; the others change no answer.
                "config": config.model_dump(exclude={"during", "general", "judge", "remote"}),
                "policies": {str(k): read_serving(self.stage_dir(k)).hash for k, _ in wanted},
                "data": hashes_of_test_sets(self.dir, (task for _, task in wanted)),
            }

        def work(show: Show, lock: int) -> Facts:
            wanted, notes = cells() or [], []

            def listen(line: str) -> None:
                if line.startswith(FALLBACK):
                    notes.append(line)
                show(line)

            if todo := left(wanted):
                file = self.dir / "steps" / f"{step.file_name}-cells.json"
                modules = [self.recipe.folder, os.getcwd()]  # where scorers of the user's own are
                write_json(file, {"cells": todo, "config": config.model_dump(), "modules": modules})
                python, command = (
                    [sys.executable, "-P"],
                    ["-m", "mcit.eval.evaluate", str(self.dir), "--cells", str(file)],
                )
                with contextlib.ExitStack() as stack:
                    others = [self.evaluate(row=k) for k in sorted({k for k, _ in todo}) if row is None]
                    locks = [stack.enter_context(self._locked(other)) for other in others]
                    self._child(step.file_name, python, command, _ENGINES, listen, lock, *locks)
            engines = {str(read_json(load_cell(self.dir, *cell, config).marker)["engine"]) for cell in wanted}
            return {"answered": len(todo), "engines": sorted(engines), "notes": notes}

        title, marker = name.replace("/", " stage "), self._marker(name.replace("/", "-"))
        step = Step(name, title, marker, lambda: not left(cells() or []), inputs, work)
        return step

    def judging(self, partly: bool = False) -> list[Step]:
        """What scores reasoning, if the recipe names a judge."""
        return [self.judge(partly)] if self.recipe.eval.judge is not None else []

    def judge(self, partly: bool = False) -> Step:
        """Scores of the reasoning in all answers that are needed (`partly`: that there are), by `eval.judge`."""
        judge, evaluated = self.recipe.eval.judge, self.evaluate(partly=partly)

        def cells() -> list[JudgedCell] | None:
            if judge is None or evaluated.done() is None:
                return None
            config, general = self.recipe.eval, [task.name for task in self.recipe.eval.general]
            wanted = [(k, task) for k, task in self._needed_cells() if task not in general]
            done = [k for k, step in enumerate([self.check(), *self.training()]) if step.done()]
            there = [cell for cell in wanted if cell[0] in done and load_cell(self.dir, *cell, config).is_done()]
            return judged_cells(self.dir, there, judge)

        def inputs() -> Facts | None:
            found = cells()
            if found is None or judge is None:
                return None
            known = {f"{cell.stage} {cell.task['name']}": cell.fingerprint for cell in found}
            return {"judge": judge_identity(judge), "cells": known}

        def work(show: Show, lock: int) -> Facts:
            found = cells() or []
            todo = [cell for cell in found if not cell.is_done()]
            if judge is not None and todo:
                judge_cells(todo, judge, cache_dir(), show)
            outcomes = Counter[str]()
            for cell in found:
                outcomes.update(read_json(cell.marker)["outcomes"])
            return {"cells": len(found), "outcomes": dict(outcomes)}

        def there() -> bool:
            return all(cell.is_done() for cell in cells() or [])

        return Step("judge", "judge reasoning", self._marker("judge"), there, inputs, work)
