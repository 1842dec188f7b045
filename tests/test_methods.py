"""What holds for every method: it is described, validated, and expands visibly. A new method is covered by its name."""

import pytest

from mcit.data_prep.errors import InputError
from mcit.pipeline.methods import EXPANSIONS, METHODS, Method, build_methods, expand, get_method
from mcit.pipeline.recipe.schema import TrainConfig

PARADIGMS, LINEAGES = {"sft", "rft"}, {"stack", "fold", "continue", "independent", "full"}
MODES = {"single", "ddp", "zero2", "zero3"}
CATEGORIES = {"bound", "regularisation", "replay", "distillation", "data", "architecture", "merging", "schedule"}


class Elsewhere(Method):
    """A method that lives outside the package."""

    name = "elsewhere"
    paper = category = "none"
    keeps = "nothing"
    conflicts = ("reglora",)


def train(**settings: str) -> TrainConfig:
    return TrainConfig.model_validate(settings)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and method.paper and method.category in CATEGORIES and method.cost
    assert method.keeps in ("nothing", "general data", "past data")
    assert set(method.lineages) <= LINEAGES and set(method.paradigms) <= PARADIGMS and set(method.distributed) <= MODES
    assert method.lineages and method.paradigms and method.distributed
    assert set(method.conflicts) <= set(METHODS)
    assert method.neutral, "a method names the settings under which it does nothing"
    method.Config.model_validate(method.neutral)
    assert method.__doc__ != Method.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_checked_against_the_recipe(name: str) -> None:
    method = METHODS[name]
    for lineage in LINEAGES:
        if lineage in method.lineages:
            assert isinstance(build_methods({name: {}}, train(lineage=lineage))[0], method)
        else:
            with pytest.raises(InputError, match=rf"method.{name}: works with lineage .*not {lineage}"):
                build_methods({name: {}}, train(lineage=lineage))


@pytest.mark.parametrize("name", EXPANSIONS)
def test_expansions_are_complete_and_stable(name: str) -> None:
    once = expand({name: {}})
    assert set(once) == set(EXPANSIONS[name]) <= set(METHODS)
    assert expand(once) == once


def test_sefe_is_its_two_parts() -> None:
    assert expand({"sefe": {}}) == {
        "asd": {"fraction": 0.2, "converter": "rules"},
        "reglora": {"key_fraction": 0.02, "weight": 2500.0, "overlap": "multiset"},
    }
    changed = expand({"sefe": {"reglora": {"weight": 1}}, "reglora": {"overlap": "union"}, "asd": None})
    assert changed["reglora"] == {"key_fraction": 0.02, "weight": 1.0, "overlap": "union"}
    assert expand({}) == {}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"reglore": {}}, "method.reglore: no such method. Did you mean `reglora`?"),
        ({"x": {}}, "Known: asd, .*reglora, .*sefe, .*or module:Class"),
        ({"reglora": {"wait": 1}}, "method.reglora.wait: .*Known keys: key_fraction, weight, overlap"),
        ({"reglora": {"weight": -1}}, "method.reglora.weight: .*greater than or equal to 0"),
        ({"sefe": {"weight": 1}}, "method.sefe: has no part `weight`. It takes asd, reglora"),
        ({"no.module:Class": {}}, "method.no.module:Class: cannot be imported"),
        ({"collections:OrderedDict": {}}, "is not a subclass of"),
        ({"reglora": {}, "test_methods:Elsewhere": {}}, "method.elsewhere: does not work together with reglora"),
        ({"reglora": {}, "moextend": {}}, "method.reglora: .*with moextend: it acts on LoRA, and there is none"),
    ],
)
def test_mistakes_are_one_clear_line(section: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_methods(section, train())
    assert "\n" not in str(caught.value)


def test_a_method_from_elsewhere() -> None:
    assert get_method("test_methods:Elsewhere").name == "elsewhere"
    [method] = build_methods({"test_methods:Elsewhere": {}}, train(lineage="continue"))
    assert method.data(None, [], {}, {}) == [] and method.callbacks() == [] and method.finish(None, []) == {}
