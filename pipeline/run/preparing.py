"""The steps before any training: settings, samples, the base model, and what would make a later step fail."""

from pathlib import Path

from mcit.data_prep.checks import fit_task
from mcit.data_prep.files import read_json, replace_link
from mcit.data_prep.prepare import prepare_task, read_task
from mcit.data_prep.schema import TaskConfig
from mcit.eval.hashing import cache_dir, hash_model
from mcit.eval.scoring import check_gold, scorers_of
from mcit.eval.serving import Serving, read_serving, write_serving

from ..recipe.schema import WITHOUT_EFFECT
from .directory import RunDirectory
from .disk import check_run, handed_rank
from .lengths import write_lengths
from .start import check_start, find_start, forget_start, place_start, stages_behind, start_inputs, state_hash
from .step import Facts, Show, Step


class Preparing(RunDirectory):
    """A run's steps up to the first stage."""

    def preparation(self) -> list[Step]:
        """What comes before any training."""
        return [self.settings(), *map(self.prepare, self.recipe.sources), self.base(), self.check()]

    def settings(self) -> Step:
        """Whether TRL takes the trainer arguments of every stage."""

        def inputs() -> Facts:
            return {"train": [stage.train.model_dump(exclude=WITHOUT_EFFECT) for stage in self.recipe.stages]}

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
            longest, notes, tokens = {}, [], dict[str, dict[str, int]]()
            for task, step in pairs:
                show(f"tokens of {task.name}")
                limits = recipe.max_length(task.name), recipe.eval.max_model_len, context
                folder, fit = fit_task(
                    folder_of(step), processor, *limits, on_bad=recipe.prepare.on_bad, cache=cache_dir()
                )
                notes += check_gold(folder)
                replace_link(self.dir / "data" / task.name, folder)
                longest[task.name] = {part: lengths.max for part, lengths in fit.lengths.items()}
                tokens[task.name] = fit.tokens
            write_lengths(self.dir, tokens)
            state = state_hash(sorted((self.stage_dir(0) / "method").glob("*")))
            return {"policy": row0.hash, "state": state, "longest": longest, "notes": notes}

        return Step("check", "check samples", self._marker("check"), there, inputs, work)
