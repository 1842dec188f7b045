"""What holds for every method in METHODS, as stages really train. A new one is covered by its name.

`make test` takes one case of each invariant, `make test-all` these:

- *what trains*: every method in every lineage and paradigm that it names, so that each is trained at least once;
- the others only where a method has what they look at, in its `home`, the lineage in which what stage 1 has left
  matters most. What else a lineage does is the same for all methods (`test_lineage.py`):
  - *neutral*: every method, in each paradigm;
  - *state*: methods that leave one, in supervised tuning: reading it knows of no paradigm;
  - *stopped*, *how* and *packing*: methods that act while a stage trains (`acts`), in each paradigm. The others train
    as an empty `method:` does, which `test_resume.py` and `test_batches.py` look at;
  - *served*: methods that have something else evaluated, in every lineage.

Processes that train together are in `test_invariants_together.py`.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import pytest
from safetensors.torch import load_file
from training import largest_gap, tiny_model
from two_stages import Stages, acts, assert_same_losses, home, same, same_model, section, untimed

import mcit.pipeline.stage.entering as entering
from mcit.data_prep.files import read_json
from mcit.eval.serving import read_serving
from mcit.pipeline.methods import METHODS, Method
from mcit.pipeline.methods.hft import matrix
from mcit.pipeline.policy.lineage import target_names
from mcit.pipeline.recipe.schema import ModulesConfig

# Where a method does not train LoRA on the language model: what it trains instead, in which model.
EXPERTS = {
    f"model.language_model.layers.1.mlp.{part}"
    for part in ("gate.rows", "experts.new.gate_up_proj", "experts.new.down_proj")
}
# How many layers do not train: those of three of five blocks; 10 of 20 matrices of attention, 8 of 15 of the MLPs, and
# under `full` 5 of 10 norms.
FROZEN = {("freeze", False): 3 * 7, ("hft", False): 10 + 8, ("hft", True): 10 + 8 + 5}


def cases(rows: Iterable[tuple[str, ...]], quick: tuple[str, ...]) -> Any:
    """A mark for tests of (name, lineage, paradigm), of which `make test` takes one."""
    found = list(rows)
    assert quick in found
    marked = [pytest.param(*row, marks=[] if row == quick else pytest.mark.slow) for row in found]
    return pytest.mark.parametrize(("name", "lineage", "paradigm"), marked)


QUICK = ("reglora", "stack", "sft")
EVERY = [
    (name, lineage, paradigm)
    for name, method in METHODS.items()
    for lineage in method.lineages
    for paradigm in method.paradigms
]
AT_HOME = [row for row in EVERY if row[1] == home(row[0])]
ACTING = [row for row in AT_HOME if acts(row[0])]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp)


@cases(AT_HOME, QUICK)
def test_neutral_is_sequential_tuning_to_the_bit(train: Stages, name: str, lineage: str, paradigm: str) -> None:
    """And draws no random number; not neutral, a method that acts trains something else."""
    sequential, neutral = (train(method, lineage, paradigm) for method in ({}, section(name, neutral=True)))
    for one, two in zip(sequential, neutral, strict=True):
        assert same_model(one, two) and one.randomness == two.randomness
        assert not (two.folder / "method").exists()
    if acts(name):
        assert not same(sequential[1].weights, train(section(name), lineage, paradigm)[1].weights)


@cases(EVERY, QUICK)
def test_what_is_meant_to_be_trained_moves_and_nothing_else(
    train: Stages, name: str, lineage: str, paradigm: str
) -> None:
    whole = lineage == "full"
    meant = meant_by(name, whole)
    for stage in train(section(name), lineage, paradigm):
        idle, trained = ({matrix(weight) for weight in part} for part in (meant - stage.trainable, stage.trainable))
        assert len(idle) == FROZEN.get((name, whole), 0) and not idle & trained
        assert stage.trainable <= meant and stage.changed == stage.trainable


@cache
def meant_by(name: str, whole: bool) -> set[str]:
    """What a method trains, by name; HFT and freezing, a part of it."""
    model = tiny_model()
    layers = target_names(model, ModulesConfig())
    if whole:
        return {parameter for parameter, _ in model.named_parameters() if ".visual." not in parameter}
    prefix = "base_model.model"
    return {
        "moextend": EXPERTS,
        "moelora": {f"{layer}.{part}" for layer in layers for part in ("a", "b", "router")},
        "osf": {f"{prefix}.{layer}.osf_svd_params.default.{part}_low" for layer in layers for part in "USV"},
        "l2p": {f"model.language_model.prompt_pool.{part}" for part in ("keys", "prompts")},
    }.get(name, {f"{prefix}.{layer}.lora_{factor}.default.weight" for layer in layers for factor in "AB"})


@cases([row for row in AT_HOME if METHODS[row[0]].finish is not Method.finish and row[2] == "sft"], QUICK)
def test_a_state_that_was_saved_trains_like_the_one_in_memory(
    train: Stages, name: str, lineage: str, paradigm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is served like it, where it is what is served."""
    first, second = train(section(name), lineage, paradigm)
    assert first.states[name]
    assert same(load_file(first.folder / "method" / f"{name}.safetensors"), first.states[name])
    monkeypatch.setattr(entering, "load_state", lambda _, name: first.states[name])
    again = train(section(name), lineage, paradigm, "seed=0")[1]  # the default, spelt out: trained once more
    assert again is not second and same_model(again, second)
    served = [read_serving(stage.folder).hash for stage in (again, second)]
    assert served[0] == served[1]


@cases(
    [row for row in EVERY if METHODS[row[0]].served is not Method.served and not acts(row[0]) and row[2] == "sft"],
    ("magmax", "continue", "sft"),
)
def test_what_is_evaluated_in_the_policys_place_leaves_training_alone(
    train: Stages, name: str, lineage: str, paradigm: str
) -> None:
    sequential, other = (train(method, lineage, paradigm) for method in ({}, section(name)))
    for one, two in zip(sequential, other, strict=True):
        assert same_model(one, two)
        serving = read_serving(two.folder)
        assert (serving.kind, serving.path, serving.carried) == ("adapter", "adapter", "carried")
        policy, carried = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (one.folder / "adapter", two.folder / "carried")
        )
        assert same(policy, carried)
    assert serving.hash != read_serving(one.folder).hash  # the first stage's may be the same: nothing to merge it with


@cases(ACTING, QUICK)
def test_a_stage_that_is_stopped_again_and_again_is_one_that_never_was(
    train: Stages, name: str, lineage: str, paradigm: str
) -> None:
    """To the bit: weights, log, scores, methods' states and random numbers; with all that has a state of its own."""
    args = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 1e-3, "logging_steps": 2}
    if paradigm == "rft":  # a generation batch, of two optimizer steps, ends before the stage does
        args |= {"max_steps": 7, "steps_per_generation": 2}
    more = [f"train.{paradigm}.args.{key}={value}" for key, value in args.items()]
    more += ["train.lora.dropout=0.1", "eval.during={dense: 1, growth: 1, probes: 2}"]
    whole, parts = (train(section(name), lineage, paradigm, *more, stop=stop)[1] for stop in (False, True))
    assert same_model(whole, parts) and whole.randomness == parts.randomness
    assert whole.states.keys() == parts.states.keys()
    assert all(same(state, parts.states[method]) for method, state in whole.states.items())
    assert untimed(whole.folder) == untimed(parts.folder) and len(untimed(whole.folder)) > 2
    curves, others = (read_json(stage.folder / "during.json") for stage in (whole, parts))
    assert curves == others and len(curves["steps"]) > 3
    assert [path.name for path in parts.folder.parent.glob(".*")] == []


@cases(ACTING, QUICK)
@pytest.mark.parametrize("how", ["per_device_train_batch_size=4", "gradient_checkpointing=true"])
def test_how_a_step_is_computed_changes_nothing(
    train: Stages, name: str, lineage: str, paradigm: str, how: str
) -> None:
    """Not 4 × 4 instead of 16 × 1, not checkpointing: neither weights nor losses, the method's own among them."""
    plain, other = (
        train(section(name), lineage, paradigm, *more)[1] for more in ((), (f"train.{paradigm}.args.{how}",))
    )
    assert plain.rest == other.rest and largest_gap(plain.weights, other.weights) < 1e-5
    assert_same_losses(plain.folder, other.folder, "loss", "grad_norm")


@cases([row for row in ACTING if METHODS[row[0]].packs], QUICK)
def test_packing_changes_nothing(train: Stages, name: str, lineage: str, paradigm: str) -> None:
    """Questions on a picture, and answers to a prompt, in one row."""
    plain, packed = (train(section(name), lineage, paradigm, *more)[1] for more in ((), ("train.packing=true",)))
    assert plain.rest == packed.rest and largest_gap(plain.weights, packed.weights) < 1e-5
    assert_same_losses(plain.folder, packed.folder, "loss", "grad_norm")
