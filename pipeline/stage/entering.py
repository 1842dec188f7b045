"""What a stage begins with: the entering policy as a model to train, its samples, and the states of its methods."""

import copy
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from trl.models import prepare_deepspeed

from mcit.data_prep.errors import InputError
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.readers import Part
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.lora import fold, load_adapter
from mcit.eval.serving import Serving, read_serving

from ..methods import Method, build_methods
from ..planning.outlook import look_ahead
from ..policy.lineage import enter, freeze, load_past, resume
from ..policy.quantization import keep_trainable, quantised_options
from ..recipe.schedule import past_of, trained_in
from ..recipe.schema import ModelConfig, Phase, Recipe, Stage
from ..run.disk import check_disk, handed_rank, stage_needs
from ..run.lengths import lengths_of
from ..run.start import stages_behind
from ..training.arguments import deepspeed
from ..training.collator import Collator
from ..training.pictures import remember_pictures
from ..training.replay import Replays
from ..training.trainer import FiniteLoss
from .leaving import load_state
from .workplace import is_first_process

# Parameters below which threads wait for each other longer than they work: 63 steps of the embedded model take 12 s
# with one thread and, on two cores, 14 to 27 with two.
_TINY = 10_000_000


@dataclasses.dataclass(frozen=True)
class Before:
    """What the stage before left, as this stage enters it."""

    folder: Path
    serving: Serving
    previous: Path | None  # the entering policy's adapter folder; None for the base and for merged models
    weights: Path | None  # of lineage `full`: the model that is entered, where it is not the base
    half: Path | None  # what the stage's phase before this one has left


@dataclasses.dataclass(frozen=True)
class Entered:
    """A stage with everything its trainer is made from."""

    recipe: Recipe
    stage: Stage
    phase: Phase  # of the stage's
    seed: int
    model: Any  # a PeftModel, or under lineage `full` or by a method that carries the policy a model without adapters
    processor: Any
    samples: list[Sample]  # image paths absolute
    replays: Replays  # these, and what methods see beside them
    lengths: list[int] | None  # tokens of each of `replays.samples`, images included, where they were counted
    tasks: dict[str, PreparedTask]
    anchors: dict[str, PreparedTask]
    max_length: int  # tokens
    context: int  # tokens that the model can take at all
    entry: Before
    loaded: Any  # the configurations that the model was loaded with, which training may change
    methods: list[Method]
    output_dir: Path
    callbacks: list[TrainerCallback]

    @property
    def before(self) -> Serving:
        """How the stage before is served."""
        return self.entry.serving

    @property
    def previous(self) -> Path | None:
        """See `Before`."""
        return self.entry.previous

    @cached_property
    def carrier(self) -> Method | None:
        """The method that carries the policy in the place of a LoRA."""
        return carrier_of(self.methods)

    @property
    def enters_base(self) -> bool:
        """Whether the stage begins with the untouched base: a fresh LoRA changes nothing yet, new experts do."""
        entered = self.before.kind == "base" or self.stage.train.lineage == "independent"
        plain = isinstance(self.model, PeftModel) or self.stage.train.lineage == "full"
        return entered and plain and self.entry.half is None

    def load_base(self, accelerator: Any) -> Any:
        """The untouched base once more, on the accelerator's devices, to be looked at."""
        return _placed(load_model(self.recipe.base_model, attention=self.stage.train.attention), accelerator)

    def load_entering(self, accelerator: Any) -> Any:
        """The policy that this phase begins with once more, as a model without adapters, to be looked at."""
        model = load_model(self.recipe.base_model, self.entry.weights, self.stage.train.attention)
        if self.entry.weights is None:
            fold(model, load_past(self.previous, self.stage.train))
        return _placed(model, accelerator)


def find_before(folder: Path, half: Path | None, stage: Stage, methods: Sequence[Method]) -> Before:
    """What a stage goes on from. Raises `InputError` where it cannot."""
    serving, whole = read_serving(folder), stage.train.lineage == "full"
    carried = carrier_of(methods) is not None or (whole and serving.kind == "merged")
    if serving.kind in ("merged", "extended") and not carried and not serving.carried:
        what = {"merged": "a merged model", "extended": "an extended model"}[serving.kind]
        problem = f"is {what}, and a stage starts from the base or an adapter on it"
        raise InputError(problem, where=folder / "serving.json")
    weights = folder / str(serving.path) if whole and serving.kind == "merged" else None
    if whole and half:
        weights = half / "merged"
    return Before(folder, serving, folder / serving.handed if serving.handed else None, weights, half)


def enter_stage(
    recipe: Recipe, stage: Stage, phase: Phase, run_dir: Path, folder: Path, half: Path | None, output: Path
) -> Entered:
    """Load what a stage begins with. `folder` is that of the stage before, `half` what an earlier phase has left.

    Sets all seeds. Raises `InputError`.
    """
    methods = build_methods(recipe.method, stage.train)
    before, carrier = find_before(folder, half, stage, methods), carrier_of(methods)
    states = {
        method.name: (half and load_state(half, method.name)) or load_state(folder, method.name) for method in methods
    }
    samples, tasks = _data(recipe, stage, run_dir, methods, states)
    anchors = {anchor.name: read_task(run_dir / "data" / anchor.name) for anchor in recipe.anchors}
    general = [one for name, task in anchors.items() for one in samples_of(run_dir / "data" / name, task, "train")]
    replays = Replays(samples, {method.name: wanted for method in methods if (wanted := method.replay(general))})

    # Not the recipe's seed itself: every stage would start from the same LoRA factors and the same order.
    behind = stages_behind(run_dir / "stages" / "00-base")
    seed = (recipe.seed * 1_000_003 + behind + stage.k) % 2**31
    set_seed(seed)
    model = load_model(recipe.base_model, before.weights, stage.train.attention)
    processor = load_processor(recipe.base_model)
    loaded = copy.deepcopy((model.config, model.generation_config))
    if not torch.cuda.is_available() and model.num_parameters() < _TINY:
        torch.set_num_threads(1)
    if is_first_process():
        outlook = look_ahead(stage, model, handed_rank(folder), behind + stage.k - 1)
        check_disk(run_dir, stage_needs(outlook, methods), f"stage {stage.k}")
    context = model.config.get_text_config().max_position_embeddings
    max_length = min(stage.train.max_length or context, context)
    if carrier:
        tuned: Any = carrier.enter(model, states[carrier.name], Collator(processor, [], max_length))
    else:
        tuned = enter(model, None if before.weights else before.previous, stage.train)
        if half and stage.train.lineage != "full":
            resume(tuned, load_adapter(half / "adapter"), half)
    for method in methods:
        method.build(tuned, states[method.name])
    freeze(model.get_encoder("image"))
    if stage.train.picture_cache:
        remember_pictures(tuned, stage.train.picture_cache * 2**30)
    return Entered(
        recipe=recipe,
        stage=stage,
        phase=phase,
        seed=seed,
        model=tuned,
        processor=processor,
        samples=samples,
        replays=replays,
        lengths=lengths_of(run_dir, replays.samples),
        tasks=tasks,
        anchors=anchors,
        max_length=max_length,
        context=context,
        entry=before,
        loaded=loaded,
        methods=methods,
        output_dir=output,
        callbacks=[*(callback for method in methods for callback in method.callbacks()), FiniteLoss(stage)],
    )


def carrier_of(methods: Sequence[Method]) -> Method | None:
    """The method that carries the policy in the place of a LoRA."""
    return next((method for method in methods if method.carries), None)


def load_model(base: ModelConfig, weights: Path | None = None, attention: str | None = None) -> Any:
    """The untouched base model, or the merged one in `weights`, in the recipe's dtype: on the CPU, or, quantised, on
    the process's device.

    Raises `InputError` where this machine does not compute `attention`.
    """
    options = {"attn_implementation": attention} if attention else {}
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            weights or base.path,
            revision=None if weights else base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,  # never a pickle
            dtype=getattr(torch, base.dtype),
            **options,
            **quantised_options(base),
        )
    except (ImportError, ValueError) as error:
        if attention is None or "attention" not in str(error).lower():
            raise
        reason, remedy = str(error).split(". ")[0].rstrip("."), "Leave it out: transformers takes what there is"
        raise InputError(f"{attention}: {reason}", where="recipe", field="train.attention", remedy=remedy) from None
    keep_trainable(model)
    return model


def load_processor(base: ModelConfig) -> Any:
    """The base model's processor with the recipe's settings (`min_pixels`, `max_pixels`, …)."""
    return AutoProcessor.from_pretrained(
        base.path, revision=base.revision, trust_remote_code=base.trust_remote_code, **base.processor
    )


def samples_of(folder: Path, task: PreparedTask, part: Part) -> list[Sample]:
    """The samples of a prepared task with absolute image paths."""
    folder = folder.resolve()
    return [
        {**sample, "images": [str(image_path(folder, task, image)) for image in sample["images"]]}
        for sample in read_samples(folder, part)
    ]


def trained_by(recipe: Recipe, stage: Stage, run_dir: Path) -> list[Sample]:
    """What a stage trains, before methods change it."""
    return [
        sample
        for name in (*stage.tasks, *stage.visitors)
        for sample in trained_in(
            samples_of(run_dir / "data" / name, read_task(run_dir / "data" / name), "train"),
            stage.k,
            recipe.homes(name),
            len(recipe.stages),
            recipe.blur,
            recipe.seed,
        )
    ]


def _data(
    recipe: Recipe, stage: Stage, run_dir: Path, methods: Sequence[Method], states: dict[str, dict[str, torch.Tensor]]
) -> tuple[list[Sample], dict[str, PreparedTask]]:
    """What the stage trains, by the methods that have a say in it, and the tasks that it comes from."""
    samples = trained_by(recipe, stage, run_dir)
    keeps = any(method.keeps == "past data" for method in methods)
    past = (
        past_of(recipe.stages, stage.k, samples, lambda earlier: trained_by(recipe, earlier, run_dir)) if keeps else {}
    )
    for method in methods:
        samples = method.data(stage, samples, past if method.keeps == "past data" else {}, states[method.name])
    names = dict.fromkeys([*stage.tasks, *stage.visitors, *(sample["task"] for sample in samples)])
    return samples, {name: read_task(run_dir / "data" / name) for name in names}


def _placed(model: Any, accelerator: Any) -> Any:
    """A model that is only looked at, on the accelerator's devices."""
    return prepare_deepspeed(model, accelerator).module if deepspeed() else model.to(accelerator.device)
