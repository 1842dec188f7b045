"""What holds for every method in METHODS, as stages really train. A new one is covered by its name.

Stage 1 is supervised tuning; stage 2 goes on in the lineages and paradigms that the method names. `make test` takes one
representative of each, `make test-all` the product.
"""

import json
import pickle
import random
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_qwen3_vl_moe
from safetensors.torch import load_file
from training import COLOURS, largest_gap, launch, make_run, make_samples, tiny_model, uneven
from transformers import TrainerCallback

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
import mcit.pipeline.stage.entering as entering
import mcit.pipeline.stage.stage as stage_script
from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.serving import read_serving
from mcit.pipeline.methods import METHODS, Method, build_methods
from mcit.pipeline.methods.outlook import look_ahead
from mcit.pipeline.planning.memory import meta_model
from mcit.pipeline.policy.lineage import target_names
from mcit.pipeline.recipe.schema import ModulesConfig, load_recipe
from mcit.pipeline.run.disk import handed_rank, stage_needs, trained_parameters
from mcit.pipeline.run.preemption import Preempted
from mcit.pipeline.training.collator import Collator
from mcit.pipeline.training.replay import backbone

# Where a method's defaults are not for a tiny model and a learning rate of 0.2.
SETTINGS: dict[str, dict[str, Any]] = {
    "der": {"buffer": 8, "per_batch": 3, "weight": 0.1, "label_weight": 0.5},
    "ewc": {"weight": 0.1, "samples": 8},
    "fpf": {"times": 2, "steps": 2, "buffer": 8, "per_batch": 3},
    "gere": {"per_batch": 3, "weight": 1},
    "ilora": {"buffer": 8, "per_batch": 3, "decay": 0.5},
    "interference": {"per_batch": 3},
    "l2": {"weight": 0.1},
    "l2p": {"pool": 4, "length": 2, "top": 2},
    "moelora": {"experts": 2},
    "mas": {"weight": 0.01, "samples": 8},
    "moextend": {"experts": 2, "layers": [1]},
    "olora": {"weight": 0.01},
    "refresh": {"step": 1e-2, "samples": 8},
    "reglora": {"weight": 100},
    "replay": {"buffer": 8, "per_batch": 3},
}
# Where it does not train LoRA on the language model: what it trains instead, in which model.
MIXTURE = tempfile.TemporaryDirectory(prefix="mcit-mixture-")
EXPERTS = {f"model.language_model.layers.1.mlp.{part}" for part in ("gate.rows", "experts.new.gate_up_proj")}
# The share of the adapters that trains: of five blocks two; of 20 matrices of attention half, of 15 of the MLPs seven.
PART = {"freeze": 2 / 5, "hft": 17 / 35}
EXPERTS |= {"model.language_model.layers.1.mlp.experts.new.down_proj"}
# Those whose memory is tensors that they have all the time, and on the device.
HELD = ("ewc", "ilora", "l2", "lwf", "mas", "olora", "reglora")

RECIPE = """
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 16
  sft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
  rft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, max_steps: 3, beta: 0.1,
               num_generations: 4, max_completion_length: 6, temperature: 0.5, gradient_checkpointing: false}}
"""
STAGES = ("01-colour", "02-again")
# Stage 1 teaches half of its colours wrongly: a policy that is always right, or never, learns nothing from rewards.
TEACH = ("train.sft.args.optim=adamw_torch", "train.sft.args.learning_rate=1e-2", "train.sft.args.max_steps=25")

Section = Mapping[str, Mapping[str, Any]]


@dataclass
class Trained:
    """A stage as it was and as training left it."""

    folder: Path
    before: dict[str, torch.Tensor]  # all parameters and buffers, by name
    after: dict[str, torch.Tensor]
    trainable: set[str]
    randomness: bytes  # the states of all generators at the end
    states: dict[str, dict[str, torch.Tensor]]  # of the methods, before they were saved
    held: dict[str, int]  # bytes of the tensors that methods had as training ended
    length: float  # tokens of a sample, on average
    passed: dict[bool, int]  # tokens that went through the model, with gradients and without


Train = Callable[..., list[Trained]]


def section(name: str, neutral: bool = False) -> Section:
    return {name: METHODS[name].neutral if neutral else SETTINGS.get(name, {})}


def take_one(cases: list[tuple[str, ...]], quick: tuple[str, ...]) -> list[Any]:
    assert quick in cases
    return [pytest.param(*case, marks=[] if case == quick else pytest.mark.slow) for case in cases]


every_way = pytest.mark.parametrize(
    ("name", "lineage", "paradigm"),
    take_one(
        [
            (name, lineage, paradigm)
            for name, method in METHODS.items()
            for lineage in method.lineages
            for paradigm in method.paradigms
        ],
        ("reglora", "stack", "sft"),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folder with the data, and the recipe."""
    run = tmp_path_factory.mktemp("prepared")
    samples = {"colour": make_samples("colour", 32), "again": uneven("again", 20, 1)}
    for sample in samples["colour"][::2]:
        colour = COLOURS.index(sample["references"][0])
        sample["completion"] = [{"role": "assistant", "content": COLOURS[colour - 1]}]
    anchors = {"pictures": make_samples("pictures", 5), "sentences": uneven("sentences", 6, 0)}
    return run, make_run(run, samples, RECIPE, anchors=anchors)


@pytest.fixture(scope="module")
def train(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains both stages with `method: section`, each once: `overrides` are those of stage 2."""

    def run_one(run: Path, k: int, paradigm: str, *overrides: str, stop_after: int | None = None) -> Trained:
        kept: dict[str, Any] = {"states": {}}
        save, make_trainer = stage_script.save_state, {"sft": sft, "rft": rft}[paradigm].make_trainer

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if state.global_step == stop_after:
                    signal.raise_signal(signal.SIGTERM)

            def on_train_end(self, *args: Any, model: Any, **_: Any) -> None:
                kept.update(
                    after=snapshot(model),
                    trainable={n for n, p in model.named_parameters() if p.requires_grad},
                    held={method.name: held(method) for method in kept["methods"]},
                )

        def make(entered: Any) -> Any:
            trainer = make_trainer(entered)
            trainer.add_callback(Look)
            kept.update(before=snapshot(entered.model), methods=entered.methods, passed={True: 0, False: 0})
            tokens = Collator(entered.processor, [], 1000).collate(entered.samples)["attention_mask"].sum()
            kept.update(length=int(tokens) / len(entered.samples))

            def count(_: Any, __: Any, inputs: Mapping[str, Any]) -> None:
                kept["passed"][torch.is_grad_enabled()] += int(inputs["attention_mask"].sum())

            backbone(entered.model).register_forward_pre_hook(count, with_kwargs=True)
            return trainer

        def keep(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
            kept["states"][name] = state
            save(folder, name, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_script, "save_state", keep)
            stage_script.run_stage(load_recipe(prepared[1], overrides), k, run, paradigm, make)
        return Trained(
            run / "stages" / STAGES[k - 1],
            kept["before"],
            kept["after"],
            kept["trainable"],
            pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state())),
            kept["states"],
            kept["held"],
            kept["length"],
            kept["passed"],
        )

    @cache
    def first(method: str, lineage: str) -> Trained:
        run = tmp_path_factory.mktemp("first")
        link(prepared[0], run, "00-base")
        return run_one(run, 1, "sft", *keys(method, lineage, "sft"), *TEACH)

    @cache
    def second(method: str, lineage: str, paradigm: str, *overrides: str) -> list[Trained]:
        one, run = first(method, first_lineage(method)), tmp_path_factory.mktemp("second")
        link(one.folder.parents[1], run, "00-base", "01-colour")
        return [one, run_one(run, 2, paradigm, *keys(method, lineage, paradigm), *overrides)]

    def stopped(method: str, lineage: str, paradigm: str, *overrides: str) -> list[Trained]:
        """The second stage, stopped by a signal after its steps (under GRPO where a generation batch ends)."""
        one, run = first(method, first_lineage(method)), tmp_path_factory.mktemp("stopped")
        link(one.folder.parents[1], run, "00-base", "01-colour")
        every = *keys(method, lineage, paradigm), *overrides
        for step in (1, 2, 3) if paradigm == "sft" else (1, 3, 5):
            with pytest.raises(Preempted, match="stopped after step"):
                run_one(run, 2, paradigm, *every, stop_after=step)
        return [one, run_one(run, 2, paradigm, *every)]

    def train(section: Section, *rest: str, stop: bool = False) -> list[Trained]:
        return (stopped if stop else second)(json.dumps(section), *rest)

    return train


def first_lineage(method: str) -> str:
    """Of stage 1, which is the same in all but its name; one that the methods have."""
    allowed = [METHODS[name].lineages for name in json.loads(method)]
    return next(
        lineage for lineage in ("stack", "fold", "continue", "independent") if all(lineage in has for has in allowed)
    )


def keys(method: str, lineage: str, paradigm: str) -> list[str]:
    """What a recipe says of a stage, `method` as JSON."""
    resolved = [f"method={method}", f"train.lineage={lineage}", f"train.paradigm={paradigm}"]
    resolved += ["train.modules.language=full"] if lineage == "full" else []
    extended = json.loads(method).get("moextend", {}).get("experts", 0) > 0
    return [*resolved, f"base_model.path={mixture()}"] if extended else resolved


@cache
def mixture() -> str:
    """The folder of a tiny mixture of experts, which goes when the test process ends."""
    save_qwen3_vl_moe(Path(MIXTURE.name))
    return MIXTURE.name


def link(run: Path, to: Path, *stages: str) -> None:
    """A run of its own with the data and some stages of another."""
    (to / "stages").mkdir()
    (to / "data").symlink_to(run / "data")
    for name in stages:
        (to / "stages" / name).symlink_to(run / "stages" / name)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def held(value: Any, known: dict[int, int] | None = None) -> int:
    """Bytes of the tensors of a method, in its attributes and what they list."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        known[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    inner = (
        vars(value).values() if isinstance(value, Method) else value.values() if isinstance(value, Mapping) else value
    )
    for one in inner if isinstance(value, (Method, Mapping, list, tuple)) else ():
        held(one, known)
    return sum(known.values())


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@every_way
def test_neutral_is_sequential_tuning_to_the_bit(train: Train, name: str, lineage: str, paradigm: str) -> None:
    """And draws no random number; not neutral, a method with a loss of its own trains something else."""
    sequential, neutral = (train(method, lineage, paradigm) for method in ({}, section(name, neutral=True)))
    for one, two in zip(sequential, neutral, strict=True):
        assert same(one.after, two.after) and one.randomness == two.randomness
        assert not (two.folder / "method").exists()
    if METHODS[name].loss is not Method.loss:
        assert not same(sequential[1].after, train(section(name), lineage, paradigm)[1].after)


@every_way
def test_what_is_meant_to_be_trained_moves_and_nothing_else(
    train: Train, name: str, lineage: str, paradigm: str
) -> None:
    adapter = {
        f"base_model.model.{layer}.lora_{factor}.default.weight"
        for layer in target_names(tiny_model(), ModulesConfig())
        for factor in "AB"
    }
    layers = target_names(tiny_model(), ModulesConfig())
    whole = {parameter for parameter, _ in tiny_model().named_parameters() if ".visual." not in parameter}
    adapted = {
        "moextend": EXPERTS,
        "moelora": {f"{layer}.{part}" for layer in layers for part in ("a", "b", "router")},
        "osf": {
            f"base_model.model.{layer}.osf_svd_params.default.{part}"
            for layer in layers
            for part in ("U_low", "S_low", "V_low")
        },
        "l2p": {f"model.language_model.prompt_pool.{part}" for part in ("keys", "prompts")},
    }.get(name, adapter)
    stages = zip(train(section(name), lineage, paradigm), ("stack", lineage), strict=True)
    for stage, carried in stages:
        meant = whole if carried == "full" else adapted
        assert len(stage.trainable) == round(len(meant) * PART.get(name, 1)) and stage.trainable <= meant
        assert stage.before.keys() == stage.after.keys()
        changed = {name for name, tensor in stage.before.items() if not torch.equal(tensor, stage.after[name])}
        assert changed == stage.trainable


@every_way
def test_a_stage_is_as_large_as_was_said(
    train: Train, prepared: tuple[Path, Path], name: str, lineage: str, paradigm: str
) -> None:
    """What is left on disk, without the headers of its files; what trains; and what a method holds, if it does."""
    stage = train(section(name), lineage, paradigm)[1]
    recipe = load_recipe(prepared[1], keys(json.dumps(section(name)), lineage, paradigm))
    model, entering = meta_model(recipe.base_model), handed_rank(stage.folder.parent / STAGES[0])
    known = replace(look_ahead(recipe.stages[1], model, entering, behind=1), samples=20, answer=4.5)
    methods = build_methods(recipe.method, recipe.stages[1].train)
    weights = [file for file in stage.folder.glob("*/*.safetensors") if file.is_file()]
    left = sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    assert stage_needs(known, methods).kept == pytest.approx(left, rel=0.02)
    trained = sum(stage.before[one].numel() for one in stage.trainable)
    assert trained_parameters(known, methods) == pytest.approx(trained, rel=0.1 if name == "hft" else 0)
    if name in HELD:
        assert methods[0].memory(known) == stage.held[name] > 0


@pytest.mark.parametrize(
    ("name", "lineage"),
    take_one(
        [
            (name, lineage)
            for name, method in METHODS.items()
            for lineage in method.lineages
            if "sft" in method.paradigms and name != "moextend"  # which looks before there is a trainer
        ],
        ("reglora", "stack"),
    ),
)
def test_the_model_does_as_much_beside_training_as_was_said(
    train: Train, prepared: tuple[Path, Path], name: str, lineage: str
) -> None:
    """In tokens, within a third: kept samples are not as long as those of the stage."""
    stage = train(section(name), lineage, "sft")[1]
    recipe = load_recipe(prepared[1], keys(json.dumps(section(name)), lineage, "sft"))
    outlook = look_ahead(recipe.stages[1], meta_model(recipe.base_model), 4, behind=1)
    log = read_jsonl(stage.folder / "train_log.jsonl")
    tokens = next(row["num_tokens"] for row in reversed(log) if "num_tokens" in row)
    steps = read_json(stage.folder / "trained.json")["steps"]
    known = replace(outlook, samples=20, steps=steps, tokens=tokens, length=stage.length)
    [method] = build_methods(recipe.method, recipe.stages[1].train)
    said = method.passes(known)
    assert stage.passed[False] == pytest.approx(said.forward, rel=1 / 3)
    assert stage.passed[True] - tokens == pytest.approx(said.gradients, rel=1 / 3)


@every_way
def test_a_state_that_was_saved_trains_like_the_one_in_memory(
    train: Train, name: str, lineage: str, paradigm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = train(section(name), lineage, paradigm)
    for method, state in first.states.items():
        file = first.folder / "method" / f"{method}.safetensors"
        assert same(load_file(file) if file.exists() else {}, state)
    monkeypatch.setattr(entering, "load_state", lambda _, name: first.states[name])
    again = train(section(name), lineage, paradigm, "seed=0")[1]  # the default, spelt out: trained once more
    assert again is not second and same(again.after, second.after)


@pytest.mark.parametrize(
    ("name", "lineage"),
    take_one(
        [
            (name, lineage)
            for name, method in METHODS.items()
            if method.served is not Method.served and method.callbacks is Method.callbacks
            for lineage in method.lineages
        ],
        ("magmax", "continue"),
    ),
)
def test_what_is_evaluated_in_the_policys_place_leaves_training_alone(train: Train, name: str, lineage: str) -> None:
    sequential, other = (train(method, lineage, "sft") for method in ({}, section(name)))
    for one, two in zip(sequential, other, strict=True):
        assert same(one.after, two.after)
        serving = read_serving(two.folder)
        assert (serving.kind, serving.path, serving.carried) == ("adapter", "adapter", "carried")
        policy, carried, served = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (one.folder / "adapter", two.folder / "carried", two.folder / "adapter")
        )
        assert same(policy, carried) and not same(policy, served)


@every_way
def test_a_stage_that_is_stopped_again_and_again_is_one_that_never_was(
    train: Train, name: str, lineage: str, paradigm: str
) -> None:
    """To the bit: weights, log, scores, methods' states and random numbers; with all that has a state of its own."""
    args = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 1e-3, "logging_steps": 2}
    if paradigm == "rft":  # a generation batch, of two optimizer steps, ends before the stage does
        args |= {"max_steps": 7, "steps_per_generation": 2}
    more = [f"train.{paradigm}.args.{key}={value}" for key, value in args.items()]
    more += ["train.lora.dropout=0.1", "eval.during={dense: 1, growth: 1, probes: 2}"]
    whole, parts = (train(section(name), lineage, paradigm, *more, stop=stop)[1] for stop in (False, True))
    assert same(whole.after, parts.after) and whole.randomness == parts.randomness
    assert whole.states.keys() == parts.states.keys()
    assert all(same(state, parts.states[method]) for method, state in whole.states.items())
    assert untimed(whole.folder) == untimed(parts.folder) and len(untimed(whole.folder)) > 2
    curves, others = (read_json(stage.folder / "during.json") for stage in (whole, parts))
    assert curves == others and len(curves["steps"]) > 3
    assert [path.name for path in parts.folder.parent.glob(".*")] == []


@every_way
@pytest.mark.parametrize("how", ["per_device_train_batch_size=4", "gradient_checkpointing=true"])
def test_how_a_step_is_computed_changes_nothing(train: Train, name: str, lineage: str, paradigm: str, how: str) -> None:
    """Not 4 × 4 instead of 16 × 1, not checkpointing: neither weights nor losses, the method's own among them."""
    plain, other = (
        train(section(name), lineage, paradigm, *more)[1] for more in ((), (f"train.{paradigm}.args.{how}",))
    )
    assert largest_gap(plain.after, other.after) < 1e-5
    assert_same_losses(plain.folder, other.folder, "loss", "grad_norm")


@pytest.mark.parametrize(
    ("name", "mode"),
    take_one(
        [(name, mode) for name, method in METHODS.items() for mode in method.distributed if mode != "single"],
        ("reglora", "zero3"),
    ),
)
def test_two_processes_are_one(train: Train, prepared: tuple[Path, Path], tmp_path: Path, name: str, mode: str) -> None:
    """2 processes × 4 samples × 2 micro-batches, under checkpointing, against 1 × 16 × 1."""
    lineage = METHODS[name].lineages[0]
    first, alone = train(section(name), lineage, "sft")
    more = (f"train.sft.args.{setting}" for setting in ("per_device_train_batch_size=4", "gradient_checkpointing=true"))
    together = in_two_processes(first, prepared[1], tmp_path, name, "sft", mode, *more)
    assert_same(alone.folder, together)
    for method, state in alone.states.items():
        if state:
            loaded = load_file(together / "method" / f"{method}.safetensors")
            assert loaded.keys() == state.keys()
            close = {key: torch.isclose(loaded[key].float(), value.float(), 1e-3, 1e-5) for key, value in state.items()}
            equal = [mask.float().mean().item() for mask in close.values()]
            assert min(equal) > 0.99  # what a threshold decides may swap


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "rft" in method.paradigms])
def test_rollouts_train_alike_in_every_mode(
    train: Train, prepared: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """What two processes draw is not what one draws, but the same in every mode."""
    first, _ = train(section(name), METHODS[name].lineages[0], "rft")
    modes = [mode for mode in METHODS[name].distributed if mode != "single"]
    folders = [in_two_processes(first, prepared[1], tmp_path / mode, name, "rft", mode) for mode in modes]
    for folder in folders[1:]:
        assert_same(folders[0], folder)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """A stage's log, without how long things took."""
    rows = read_jsonl(folder / "train_log.jsonl")
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def in_two_processes(
    first: Trained, recipe: Path, run: Path, name: str, paradigm: str, mode: str, *overrides: str
) -> Path:
    """Stage 2 after `first`; its folder."""
    run.mkdir(exist_ok=True)
    link(first.folder.parents[1], run, "00-base", "01-colour")
    resolved = keys(json.dumps(section(name)), METHODS[name].lineages[0], paradigm)
    launch(run, recipe, mode, 2, *resolved, *overrides, script=paradigm)
    summary = read_json(run / "stages" / STAGES[1] / "trained.json")
    assert (summary["processes"], summary["mode"]) == (2, mode)  # the trainer itself asserts a DeepSpeedEngine
    return run / "stages" / STAGES[1]


def assert_same(one: Path, two: Path) -> None:
    """Up to the order of summation: weights, losses, and the number of trained parameters."""
    parts = [path.relative_to(one) for path in one.glob("*/*model.safetensors")]  # adapter and delta, or a merged model
    assert parts and files(one) == files(two)
    for config in one.glob("*/*config.json"):
        assert config.read_bytes() == (two / config.relative_to(one)).read_bytes()
    for part in parts:
        assert largest_gap(*(load_file(folder / part) for folder in (one, two))) < 1e-5
    assert_same_losses(one, two, "loss")
    summaries = [read_json(folder / "trained.json") for folder in (one, two)]
    assert summaries[0]["trained_parameters"] == summaries[1]["trained_parameters"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same_losses(one: Path, two: Path, *keys: str) -> None:
    logs = [read_jsonl(folder / "train_log.jsonl")[:-1] for folder in (one, two)]
    terms = {key for key in logs[0][0] if key.endswith("_loss")}
    for key in (*keys, *terms):
        assert [row[key] for row in logs[0]] == pytest.approx([row[key] for row in logs[1]], rel=1e-3, abs=1e-6), key
