"""Judging as a step of a real run of the tiny model: after evaluation, by itself, and by another judge later."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from canned import completion, serve
from rich.console import Console

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.runner import judge_run, perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.terminal import Terminal

RECIPE = f"""
name: judged
base_model: {{path: {RECIPES / "mini" / "tiny_vlm"}, dtype: float32}}
stream:
  - {{name: shapes, train: "mcit.data_prep.mini.tasks:think_counting", style: mcq, scorer: mcq, reasoning: think}}
  - {{name: sums, train: "mcit.data_prep.mini.tasks:arithmetic", style: number, scorer: number}}
prepare: {{limit: {{train: 4, test: 4}}}}
train: {{lora: {{r: 2, alpha: 4, dropout: 0}}, global_batch_size: 2, sft: {{args: {{max_steps: 1}}}}}}
eval: {{engine: transformers, cells: full, constrained: false, max_new_tokens: 80}}
"""
EXACT = "eval.judge=mcit.data_prep.mini.rationales:rate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("judged")
    (folder / "judged.yaml").write_text(RECIPE)
    before = dict(os.environ)
    os.environ |= {"MCIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    yield folder
    os.environ.clear()
    os.environ.update(before)


def terminal() -> Terminal:
    return Terminal(Console(record=True, file=open(os.devnull, "w"), width=200))


def opened(folder: Path, *overrides: str) -> Run:
    recipe = load_recipe(folder / "judged.yaml", overrides)
    return start_run(recipe, folder / "run", Launch.named("single"), terminal())


def test_judging_is_a_step_that_touches_nothing_else(folder: Path) -> None:
    plain = opened(folder)
    with pytest.raises(InputError, match=r"judged: eval.judge: names no judge"):
        judge_run(plain, terminal())
    with pytest.raises(InputError, match="has no answers to judge yet"):
        judge_run(opened(folder, EXACT), terminal())
    perform_steps(plain, plain.steps(), terminal())
    assert "reasoning" not in read_json(folder / "run" / "results.json")
    made = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.done.json")}
    made |= {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("done.json")}

    run = opened(folder, EXACT)
    assert [step.name for step in run.steps()][-4:] == ["evaluate", "judge", "results", "report"]
    judge_run(run, terminal())
    found: dict[str, Any] = read_json(folder / "run" / "results.json")["reasoning"]
    assert found["judge"]["program"] == "mcit.data_prep.mini.rationales:rate"
    assert [[n is not None for n in row] for row in found["n"]] == [[True, False]] * 3  # sums ask for no reasoning
    answers = read_jsonl(folder / "run" / "predictions" / "02" / "shapes.jsonl")
    rows = read_jsonl(folder / "run" / "judgements" / "02" / "shapes.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in answers]

    judged = sum(len({row["response"] for row in _judged(folder, k)}) for k in range(3))
    with serve(lambda body: completion(json.dumps({"logic": 1, "grounding": 2, "knowledge": 3}))) as server:
        model = [f"eval.judge.endpoint={server.address}", "eval.judge.model=m"]
        judge_run(opened(folder, *model), terminal())
        assert len(server.asked) <= judged
        reasoning = read_json(folder / "run" / "results.json")["reasoning"]
        assert reasoning["judge"]["model"] == "m"
        run = opened(folder, *model)
        assert all(step.done() for step in run.steps())  # a whole run has nothing left to do
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())  # neither trained nor answered again
    assert "Reasoning beside answers" in (folder / "run" / "report" / "index.html").read_text()


def _judged(folder: Path, k: int) -> list[dict[str, Any]]:
    answers = read_jsonl(folder / "run" / "predictions" / f"{k:02d}" / "shapes.jsonl")
    rows = read_jsonl(folder / "run" / "judgements" / f"{k:02d}" / "shapes.jsonl")
    return [answer for answer, row in zip(answers, rows, strict=True) if row["outcome"] == "judged"]
