"""The steps of a run: what each depends on, whether it is done, and how it is done.

A step is done when its marker, written last, holds the fingerprint of what it depends on now. A stage depends on its
resolved recipe, the data it trains on, and the policy and method state it enters with; hardware is no part of it.
"""

import contextlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mcit.data_prep.checks import fit_task
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json, replace_link, write_json
from mcit.data_prep.prepare import prepare_task, read_task
from mcit.data_prep.schema import TaskConfig
from mcit.eval.cells import load_cell, needed_cells
from mcit.eval.engines import FALLBACK
from mcit.eval.gathering import assemble_results
from mcit.eval.hashing import cache_dir, hash_model
from mcit.eval.judge.cells import JudgedCell, judge_cells, judged_cells
from mcit.eval.judge.judges import judge_identity
from mcit.eval.results import write_results
from mcit.eval.scoring import check_gold, scorers_of
from mcit.eval.serving import Serving, read_serving, write_serving

from ..recipe.loading import write_recipe
from ..recipe.schema import Phase, Recipe, Stage
from ..stage.workplace import work_folder
from .child import run_child
from .disk import check_run, handed_rank
from .forks import SCRIPT, fork_server
from .inputs import effective_recipe, entering_hashes, hashes_of_test_sets, stage_inputs
from .locks import locked
from .start import check_start, find_start, forget_start, place_start, stages_behind, start_inputs, state_hash
from .step import Facts, Launch, Show, Step

# What stages and evaluation import at work, as far as it takes time; what is not installed is passed over.
_LOADING = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.tokenization_mistral_common",
    "peft",
)
TRAINERS = ("deepspeed", *_LOADING)
ENGINES = (
    "mcit.eval.engines.vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "mcit.eval.cells",
    "mcit.eval.engines.transformers",
    "mcit.eval.liveness",
    *_LOADING,
)


class Run:
    """A recipe, its run directory, and the steps that lead from one to the other."""

    def __init__(self, recipe: Recipe, directory: Path, launch: Launch):
        self.recipe, self.dir, self.launch = recipe, directory, launch

    def steps(self, rows: Iterable[int] = ()) -> list[Step]:
        """All steps in order; the stages `rows` are evaluated by themselves before what is left of them is."""
        alone = [self.evaluate(row=k) for k in rows]
        measured = [self.evaluate(), *self.judging(), *self.reporting()]
        return [*self.preparation(), *self.training(), *alone, *measured, *self.publication()]

    def preparation(self) -> list[Step]:
        """What comes before any training."""
        return [self.settings(), *map(self.prepare, self.recipe.sources), self.base(), self.check()]

    def training(self) -> list[Step]:
        """The stages 1…K."""
        return [self.train(stage) for stage in self.recipe.stages]

    def judging(self, partly: bool = False) -> list[Step]:
        """What scores reasoning, if the recipe names a judge."""
        return [self.judge(partly)] if self.recipe.eval.judge is not None else []

    def reporting(self) -> list[Step]:
        """What gathers all that was measured."""
        return [self.results(), self.report()]

    def perform(self, step: Step, show: Show) -> tuple[Facts, bool]:
        """Do a step under its lock unless it is done; returns its marker and whether there was anything to do."""
        if not step.again and (marker := step.done()):
            return marker, False
        with self._locked(step) as lock:
            before = step.done()
            if before and not step.again:  # another process did it meanwhile
                return before, False
            inputs = step.inputs()
            if inputs is None:
                raise InputError(f"{step.title}: a step before it is not done", where=self.dir, remedy="Use `mcit run`")
            start = time.monotonic()
            facts = step.work(show, lock)
            if before and facts.items() <= before.items():
                return before, False
            seconds = round(time.monotonic() - start, 3)
            marker = {"fingerprint": hash_json(inputs), "seconds": seconds, **facts, "inputs": inputs}
            write_json(step.marker, marker)
            return marker, True

    def lock(self, step: Step) -> Path:
        """The lock of a step."""
        return self.dir / "steps" / f"{step.file_name}.lock"

    def stage_dir(self, k: int) -> Path:
        """The folder of stage `k`; 0 is the base."""
        return self.dir / "stages" / (self.recipe.stages[k - 1].folder if k else "00-base")

    def settings(self) -> Step:
        """Whether TRL takes the trainer arguments of every stage."""

        def inputs() -> Facts:
            return {"train": [stage.train.model_dump(exclude={"checkpoint_every"}) for stage in self.recipe.stages]}

        def work(show: Show, lock: int) -> Facts:
            from ..training.arguments import (  # here: TRL takes seconds, and only new settings need it
                check_stage,
                try_config,
            )

            for stage in self.recipe.stages:
                check_stage(stage)
                try_config(stage)
            return {}

        return Step("settings", "check settings", self._marker("settings"), lambda: True, inputs, work)

    def prepare(self, task: TaskConfig) -> Step:
        """The samples of a task, of a set of anchors, or of a general task, in the cache."""
        recipe, marker = self.recipe, self._marker(f"prepare-{task.name}")
        asd = recipe.asd if task in recipe.tasks else None

        def there() -> bool:
            return (Path(read_json(marker)["folder"]) / "task.json").is_file()

        def inputs() -> Facts:
            return {
                "task": task.model_dump(exclude={"overrides"}),
                "prepare": recipe.prepare.model_dump(),
                "asd": asd.identity() | {"seed": recipe.seed} if asd else None,
            }

        def work(show: Show, lock: int) -> Facts:
            home, cache = Path(recipe.folder), cache_dir()
            folder = prepare_task(
                task, recipe.prepare, seed=recipe.seed, asd=asd, base_dir=home, cache=cache, show=show
            )
            return {"folder": str(folder)}

        return Step(f"prepare/{task.name}", f"prepare {task.name}", marker, there, inputs, work, again=True)

    def base(self) -> Step:
        """Row 0: how the untouched base model is served, and its hash; or the policy that the run starts from."""
        model, folder, start = self.recipe.base_model, self.stage_dir(0), self.recipe.start_from

        def inputs() -> Facts:
            # A Hub id comes with the commit that the run began with, so only a folder can change below us.
            local = {"hash": hash_model(model.path)} if Path(model.path).is_dir() else {}
            return model.model_dump(exclude={"quantization"}) | local | (start_inputs(start, folder) if start else {})

        def work(show: Show, lock: int) -> Facts:
            digest = hash_model(model.path, model.revision)
            settings = model.model_dump(exclude={"path", "quantization"})
            row0 = Serving(
                stage=0, name="base", kind="base", base=model.path, base_hash=digest, hash=digest, **settings
            )
            if start:
                from ..methods import build_methods  # here: needs torch

                found, train = find_start(start), self.recipe.stages[0].train
                carriers = (method.name for method in build_methods(self.recipe.method, train) if method.carries)
                check_start(found, train.lineage, next(carriers, None))
                row0 = place_start(found, row0, folder)
            else:
                forget_start(folder)
            write_serving(folder, row0)
            for k in range(1, len(self.recipe.stages) + 1):  # the same model may lie elsewhere by now
                if (self.stage_dir(k) / "serving.json").exists():
                    serving = read_serving(self.stage_dir(k))
                    if serving.base_hash == digest:
                        moved = {"base": model.path, "revision": model.revision}
                        write_serving(self.stage_dir(k), serving.model_copy(update=moved))
            return {"policy": row0.hash, "state": state_hash(sorted((folder / "method").glob("*")))}

        return Step("base", "base model", folder / "done.json", (folder / "serving.json").exists, inputs, work)

    def check(self) -> Step:
        """What would make training or scoring fail later is found here; then RUN/data/<task> is linked."""
        recipe, prepared, base = self.recipe, [self.prepare(task) for task in self.recipe.sources], self.base()
        pairs = list(zip(recipe.sources, prepared, strict=True))

        def folder_of(step: Step) -> Path:
            return Path(read_json(step.marker)["folder"])

        def there() -> bool:
            return all((self.dir / "data" / task.name / "task.json").is_file() for task in recipe.sources)

        def inputs() -> Facts | None:
            row0, *markers = [step.done() for step in (base, *prepared)]
            if row0 is None or None in markers:
                return None
            return {
                "policy": row0["policy"],
                **({"state": row0["state"]} if row0["state"] else {}),
                "processor": recipe.base_model.processor,
                "folders": [marker["folder"] for marker in markers if marker],
                "on_bad": recipe.prepare.on_bad,
                "limits": {task.name: recipe.max_length(task.name) for task in recipe.sources},
                "max_model_len": recipe.eval.max_model_len,
                "scorers": {task.name: scorers_of(read_task(folder_of(step))) for task, step in pairs},
            }

        def work(show: Show, lock: int) -> Facts:
            from transformers import AutoConfig  # here: takes seconds, and only a check that is not done needs it

            from mcit.eval.engines.base import load_processor

            row0 = read_serving(self.stage_dir(0))
            config = AutoConfig.from_pretrained(
                row0.base, revision=row0.revision, trust_remote_code=row0.trust_remote_code
            )
            done = [stage.k for stage in recipe.stages if (self.stage_dir(stage.k) / "serving.json").exists()]
            entered = self.stage_dir(0)
            check_run(self.dir, recipe, config, done, handed_rank(entered), stages_behind(entered))
            context, processor = config.get_text_config().max_position_embeddings, load_processor(row0)
            longest, notes = {}, []
            for task, step in pairs:
                show(f"tokens of {task.name}")
                limits = [
                    min(given or context, context)
                    for given in (recipe.max_length(task.name), recipe.eval.max_model_len)
                ]
                folder, fit = fit_task(
                    folder_of(step), processor, *limits, on_bad=recipe.prepare.on_bad, cache=cache_dir()
                )
                notes += check_gold(folder)
                replace_link(self.dir / "data" / task.name, folder)
                longest[task.name] = {part: lengths.max for part, lengths in fit.lengths.items()}
            state = state_hash(sorted((self.stage_dir(0) / "method").glob("*")))
            return {"policy": row0.hash, "state": state, "longest": longest, "notes": notes}

        return Step("check", "check samples", self._marker("check"), there, inputs, work)

    def train(self, stage: Stage) -> Step:
        """One tuning step, in a process (or several) of its own."""
        recipe, folder = self.recipe, self.stage_dir(stage.k)
        before = self.train(recipe.stages[stage.k - 2]) if stage.k > 1 else self.check()

        def inputs() -> Facts | None:
            entering = before.done()
            return None if entering is None else stage_inputs(recipe, stage, self.dir, entering)

        def work(show: Show, lock: int) -> Facts:
            phases, half = stage.train.phases, folder.parent / stage.half_folder
            for stale in folder.parent.glob(f"*{stage.k:02d}-*"):
                ours = stale in (folder, half, work_folder(folder), work_folder(half))
                if not ours and stale.name.lstrip(".").startswith(f"{stage.k:02d}-"):
                    shutil.rmtree(stale)  # half-made, or of another stream
            for phase in phases:
                name = step.file_name if len(phases) == 1 else f"{step.file_name}-{phase}"
                self._train(stage, phase, name, show, lock)
            return entering_hashes(folder) | {"trained": read_json(folder / "trained.json")}

        title, there = f"train stage {stage.k}/{len(recipe.stages)} {stage.name}", (folder / "serving.json").exists
        step = Step(f"train/{stage.k}", title, folder / "done.json", there, inputs, work, extras=("during",))
        return step

    def assist(self, stage: Stage, show: Show) -> None:
        """This node's processes of a stage that node 0 trains: it holds the lock and writes what comes of it."""
        if not self.train(stage).done():
            for phase in stage.train.phases:
                self._train(stage, phase, f"train-{stage.k}-node-{self.launch.rank}", show)

    def _train(self, stage: Stage, phase: Phase, name: str, show: Show, *locks: int) -> None:
        """Start the script of one of a stage's phases on this node."""
        script = Path(__file__).parents[1] / f"{phase}.py"
        settled = self.dir / "steps" / f"{name}.yaml"  # RUN/recipe.yaml may be another's by now
        write_recipe(self.recipe, settled)
        options = ["--recipe", str(settled), "--stage", str(stage.k), "--run-dir", str(self.dir)]
        command, modules = [str(script), *options], (f"mcit.pipeline.{phase}", *TRAINERS)
        self._child(name, self.launch.command(), command, modules, show, *locks, launcher=True)

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
                    self._child(step.file_name, python, command, ENGINES, listen, lock, *locks)
            engines = {str(read_json(load_cell(self.dir, *cell, config).marker)["engine"]) for cell in wanted}
            return {"answered": len(todo), "engines": sorted(engines), "notes": notes}

        title, marker = name.replace("/", " stage "), self._marker(name.replace("/", "-"))
        step = Step(name, title, marker, lambda: not left(cells() or []), inputs, work)
        return step

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
            if not path.exists() or read_json(path) != results:
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

    def _marker(self, name: str) -> Path:
        return self.dir / "steps" / f"{name}.json"

    def _locked(self, step: Step) -> contextlib.AbstractContextManager[int]:
        return locked(self.lock(step), f"{step.title} of {self.dir}")

    def _child(
        self,
        name: str,
        python: list[str],
        command: list[str],
        modules: tuple[str, ...],
        show: Show,
        *locks: int,
        launcher: bool = False,
    ) -> None:
        """Run a child process of a step, with its log in RUN/logs/: `command`, by the command line `python`.

        Where children are forked, it is from a process that has imported `modules`.
        """
        # PASSIVE: threads that spin while they wait take the cores from whatever else runs, from each other too.
        # MALLOC…, for glibc: memory that every step on a CPU needs anew is kept, not given back and faulted in again.
        usual = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        usual |= {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
        if self.launch.forks:
            usual["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported; a stage sets it too late for that
        env, log = usual | os.environ | {"TOKENIZERS_PARALLELISM": "false"}, self.dir / "logs" / f"{name}.log"
        if self.launch.forks:
            start = fork_server([*python, str(SCRIPT), *modules], env).start
            run_child(command, log, env, show, *locks, launcher=launcher, start=start)
        else:
            run_child([*python, *command], log, env, show, *locks, launcher=launcher)
