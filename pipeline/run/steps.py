"""The steps of a run: what each depends on, whether it is done, and how it is done.

A step is done when its marker, written last, holds the fingerprint of what it depends on now. A stage depends on its
resolved recipe, the data it trains on, and the policy and method state it enters with; hardware is no part of it.
Steps need those before them, and so do the files they are in: `preparing`, `tuning`, `measuring`, and this one.
"""

import contextlib
from collections.abc import Iterable

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json
from mcit.eval.gathering import assemble_results
from mcit.eval.results import write_results

from .inputs import effective_recipe
from .measuring import Measuring
from .step import Facts, Show, Step


class Run(Measuring):
    """A recipe, its run directory, and all the steps that lead from one to the other."""

    def steps(self, rows: Iterable[int] = ()) -> list[Step]:
        """All steps in order; the stages `rows` are evaluated by themselves before what is left of them is."""
        alone = [self.evaluate(row=k) for k in rows]
        measured = [self.evaluate(), *self.judging(), *self.reporting()]
        return [*self.preparation(), *self.training(), *alone, *measured, *self.publication()]

    def reporting(self) -> list[Step]:
        """What gathers all that was measured."""
        return [self.results(), self.report()]

    def results(self) -> Step:
        """RUN/results.json, gathered from the markers."""
        recipe, path = self.recipe, self.dir / "results.json"
        effective = effective_recipe(recipe)

        def inputs() -> Facts | None:
            return {"recipe": effective} if self.check().done() else None

        def work(show: Show, lock: int) -> Facts:
            results = assemble_results(
                self.dir,
                name=recipe.name,
                seed=recipe.seed,
                method=recipe.method,
                stages=[{"k": stage.k, "name": stage.name, "tasks": stage.tasks} for stage in recipe.stages],
                learned=recipe.learned,
                general=[task.name for task in recipe.eval.general],
                judge=recipe.eval.judge,
                recipe_hash=hash_json(effective),
            )
            with contextlib.suppress(InputError):  # a file that is missing or damaged is written anew
                if read_json(path) == results:
                    return {"hash": hash_json(results)}
            write_results(self.dir, results)
            return {"hash": hash_json(results)}

        return Step("results", "results", self._marker("results"), path.exists, inputs, work, again=True)

    def report(self) -> Step:
        """The page RUN/report/index.html."""

        def inputs() -> Facts | None:
            results = self.results().done()
            return {"results": results["hash"]} if results else None

        def work(show: Show, lock: int) -> Facts:
            from mcit.eval.report.page import write_report  # here: needs matplotlib

            write_report([self.dir])
            return {}

        page = self.dir / "report" / "index.html"
        return Step("report", "report", self._marker("report"), page.exists, inputs, work)

    def publication(self) -> list[Step]:
        """The last step, on the Hub, if the recipe has it."""
        config = self.recipe.publish
        if config is None:
            return []

        def inputs() -> Facts | None:
            results, report = self.results().done(), self.report().done()
            return {"results": results["hash"], "publish": config.model_dump()} if results and report else None

        def work(show: Show, lock: int) -> Facts:
            from ..publishing.files import gather  # here: needs the Hub's client
            from ..publishing.hub import readable_token, send

            address, warning = send(gather(self.recipe, self.dir, config), show), readable_token()
            return {"address": address, "notes": [warning] if warning else []}

        return [Step("publish", f"publish {config.repo_id}", self._marker("publish"), lambda: True, inputs, work)]
