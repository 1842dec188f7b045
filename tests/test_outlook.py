"""What methods say beforehand that a stage will take, against stages that were trained (`two_stages.py`)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from test_invariants import AT_HOME, EVERY, QUICK, cases
from two_stages import STAGES, Stages, home, keys, section

from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.methods import build_methods
from mcit.pipeline.planning.memory import meta_model
from mcit.pipeline.planning.outlook import look_ahead
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.disk import handed_rank, stage_needs, trained_parameters

# Those whose memory is tensors that they have all the time, and on the device.
HELD = ("ewc", "ilora", "l2", "lwf", "mas", "olora", "reglora")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp)


@cases([row for row in EVERY if row[2] == "sft"], QUICK)
def test_a_stage_is_as_large_as_was_said(train: Stages, name: str, lineage: str, paradigm: str) -> None:
    """What is left on disk, without the headers of its files; what trains; and what a method holds, if it does."""
    stage = train(section(name), lineage, paradigm)[1]
    recipe = load_recipe(train.recipe, keys(section(name), lineage, paradigm))
    model, entering = meta_model(recipe.base_model), handed_rank(stage.folder.parent / STAGES[0])
    known = replace(look_ahead(recipe.stages[1], model, entering, behind=1), samples=20, answer=4.5)
    methods = build_methods(recipe.method, recipe.stages[1].train)
    weights = [file for file in stage.folder.glob("*/*.safetensors") if file.is_file()]
    left = sum(tensor.nbytes for file in weights for tensor in load_file(file).values())
    assert stage_needs(known, methods).kept == pytest.approx(left, rel=0.02)
    trained = sum(stage.weights[one].numel() for one in stage.trainable)
    assert trained_parameters(known, methods) == pytest.approx(trained, rel=0.1 if name == "hft" else 0)
    if name in HELD:
        assert methods[0].memory(known) == stage.held[name]
        assert stage.held[name] > 0 or lineage != home(name)


# MoExtend looks before there is a trainer.
@cases([row for row in AT_HOME if row[2] == "sft" and row[0] != "moextend"], QUICK)
def test_the_model_does_as_much_beside_training_as_was_said(
    train: Stages, name: str, lineage: str, paradigm: str
) -> None:
    """In tokens, within a third: kept samples have another length. One sample may try the output head."""
    stage = train(section(name), lineage, paradigm)[1]
    recipe = load_recipe(train.recipe, keys(section(name), lineage, paradigm))
    outlook = look_ahead(recipe.stages[1], meta_model(recipe.base_model), 4, behind=1)
    log = read_jsonl(stage.folder / "train_log.jsonl")
    tokens = next(row["num_tokens"] for row in reversed(log) if "num_tokens" in row)
    steps = read_json(stage.folder / "trained.json")["steps"]
    known = replace(outlook, samples=20, steps=steps, tokens=tokens, length=stage.length)
    [method] = build_methods(recipe.method, recipe.stages[1].train)
    said = method.passes(known)
    assert stage.passed[False] == pytest.approx(said.forward, rel=1 / 3, abs=2 * stage.length)
    assert stage.passed[True] - tokens == pytest.approx(said.gradients, rel=1 / 3)
