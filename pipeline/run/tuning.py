"""The steps that train: a stage each, in a process (or several) of its own."""

import shutil
from pathlib import Path

from mcit.data_prep.files import read_json

from ..recipe.loading import write_recipe
from ..recipe.schema import Phase, Stage
from ..stage.workplace import work_folder
from .inputs import entering_hashes, stage_inputs
from .preparing import Preparing
from .step import Facts, Show, Step

# What a stage imports at work, as far as it takes time; what is not installed is passed over.
_TRAINERS = (
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.tokenization_mistral_common",
    "peft",
)


class Tuning(Preparing):
    """A run's steps up to the last stage."""

    def training(self) -> list[Step]:
        """The stages 1…K."""
        return [self.train(stage) for stage in self.recipe.stages]

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
        command, modules = [str(script), *options], (f"mcit.pipeline.{phase}", *_TRAINERS)
        self._child(name, self.launch.command(), command, modules, show, *locks, launcher=True)
