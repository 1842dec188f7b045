"""The split on policies that were broken on purpose: one lost only its form, another only its knowledge."""

import shutil
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.asking import Asking
from mcit.eval.evaluate import evaluate_cells
from mcit.eval.forgetting import split_forgetting
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

READERS = '''
import numpy as np
from mcit.data_prep.mini import facts, world

PARTS = {"train": 320, "test": 100}
OTHER = dict(zip(world.COLOURS, [*list(world.COLOURS)[1:], next(iter(world.COLOURS))]))


def ask(part, answer, style):
    """What colour the one shape of a picture has, asked for as a word; the answers are those of `answer`."""
    rng = np.random.default_rng([7, list(PARTS).index(part) if part in PARTS else 2])
    for number in range(PARTS.get(part, 0)):
        picture, known = facts.scene_facts(rng, 1)
        fact = next(one for one in known if one.name == "colour_at")
        text = facts.ask(rng, fact, "short", "none")[0]
        prompt = [{"role": "user", "content": text}]
        completion = [{"role": "assistant", "content": answer(fact.answer)}]
        yield {"prompt": prompt, "completion": completion, "images": [picture], "style": style}


def colours(part):
    return ask(part, str, "short")


def sentences(part):  # the right answers, in a form that was not asked for
    return ask(part, lambda colour: f"The answer is {colour}.", "brief")


def wrong(part):  # the form that was asked for, each colour under another one's name
    return ask(part, OTHER.get, "short")
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages, each from the base, which knows the colours: colours as asked for, in sentences, and wrong ones."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "on_purpose.py").write_text(READERS)
    names = ("colours", "sentences", "wrong")
    stream = "".join(f'  - {{name: {name}, train: "on_purpose:{name}"}}\n' for name in names)
    (folder / "recipe.yaml").write_text(
        f"name: on-purpose\nbase_model: {{path: {RECIPES / 'mini' / 'tiny_vlm'}, dtype: float32}}\nstream:\n{stream}"
        + textwrap.dedent("""
            train: {lineage: independent, global_batch_size: 8, lora: {r: 8, alpha: 16, dropout: 0}, sft: {args: {
              learning_rate: 3.0e-3, max_steps: 40, warmup_steps: 4, gradient_checkpointing: false}}}
            eval: {engine: transformers, cells: seen, max_new_tokens: 12}
        """)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(folder / "cache"))
        recipe = load_recipe(folder / "recipe.yaml")
        terminal = Terminal(Console(quiet=True))
        made = start_run(recipe, folder / "run", Launch.named("single"), terminal)
        perform_steps(made, made.steps(), terminal)
    return folder / "run"


def test_a_policy_whose_form_alone_is_broken_forgot_superficially(run: Path) -> None:
    found = split_forgetting(run, {"colours": (1, 2)}, {})["tasks"]["colours"]
    print(found)
    assert found["loss"]["value"] > 90
    assert found["superficial"]["low"] > 80 and found["essential"]["high"] < 15
    assert found["recoverable"] > 90


def test_a_policy_whose_knowledge_alone_is_broken_forgot_essentially(run: Path) -> None:
    found = split_forgetting(run, {"colours": (1, 3)}, {})["tasks"]["colours"]
    print(found)
    assert found["loss"]["value"] > 90
    assert found["essential"]["low"] > 80 and abs(found["superficial"]["value"]) < 5
    assert found["recoverable"] < 5


def test_the_run_says_so(run: Path) -> None:
    results = read_json(run / "results.json")
    assert (
        results["forgetting"]["tasks"]["colours"] == split_forgetting(run, {"colours": (1, 3)}, {})["tasks"]["colours"]
    )
    assert (
        "sentences" in results["forgetting"]["left_out"] and "brief" in results["forgetting"]["left_out"]["sentences"]
    )
    colours = results["forgetting"]["tasks"]["colours"]
    assert results["metrics"]["essential"] == colours["essential"]["value"]
    assert results["metrics"]["superficial"] == colours["superficial"]["value"]
    assert results["constrained"]["known"][2][0] > 90 > 10 > results["constrained"]["known"][3][0]
    assert results["metrics"]["KC"] >= results["metrics"]["TA"] == results["metrics"]["MFN"]


def test_an_answer_that_has_its_form_would_be_the_same_held_to_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is not asked for again. Here it is, all the same."""
    copied = shutil.copytree(run, tmp_path / "run", symlinks=True)
    before = read_jsonl(run / "predictions" / "01" / "colours.jsonl")
    assert sum(row["verdict"] == "correct" for row in before) > 90
    (copied / "predictions" / "01" / "colours.done.json").unlink()
    monkeypatch.setattr(Asking, "settled", lambda *_: False)
    evaluate_cells(copied, [(1, "colours")], load_recipe(run).eval, tmp_path / "cache")
    assert read_jsonl(copied / "predictions" / "01" / "colours.jsonl") == before
