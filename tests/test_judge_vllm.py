"""A real vLLM server as the judge; and the whole path of one: tuned by the pipeline's own SFT, served, judging a run.

A few steps on the tiny model teach it the form of a verdict, not to judge: what is tested is the path.
"""

from pathlib import Path
from typing import Any

import pytest
from judging import make_stages, write_answers
from vllm_server import vllm_server

from mcit.data_prep.files import read_json, read_jsonl, write_json, write_jsonl
from mcit.data_prep.mini.rationales import rate
from mcit.data_prep.prepare import prepare_task
from mcit.data_prep.schema import LimitConfig, PrepareConfig, TaskConfig
from mcit.eval.config import JudgeConfig
from mcit.eval.judge.agreement import agreement_files
from mcit.eval.judge.cells import judge_cells, judged_cells
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe judge/mini, cut short: 600 rated rationales of all five tasks, one epoch."""
    folder = tmp_path_factory.mktemp("tuned")
    steps = ["prepare.limit.train=600", "prepare.limit.test=40", "train.sft.args.num_train_epochs=1"]
    terminal = Terminal()
    run = start_run(load_recipe("judge/mini", steps), folder / "run", Launch.named("single"), terminal)
    perform_steps(run, run.steps(), terminal)
    return run.dir


def judged_run(folder: Path) -> Path:
    """Spatial questions, whose gold reasoning is the policy's at stage 1, and the reverse of it at stage 2."""
    run, task = (
        folder / "run",
        TaskConfig(name="art", train="mcit.data_prep.mini.tasks:think_spatial", reasoning="think"),
    )
    make_stages(run)
    limit = PrepareConfig(limit=LimitConfig(train=4, test=8))
    prepared = prepare_task(task, limit, seed=0, asd=None, base_dir=folder, cache=folder / "data-cache")
    (run / "data").mkdir()
    (run / "data" / "art").symlink_to(prepared)
    samples = read_jsonl(prepared / "test.jsonl")
    for k in (1, 2):
        thinks = {s["id"]: s["meta"]["gold_think"].split(". ")[:: 1 if k == 1 else -1] for s in samples}
        responses = {name: f"<think>{'. '.join(think)}</think><answer>Yes</answer>" for name, think in thinks.items()}
        write_answers(run, k, samples, responses)
        marker = run / "predictions" / f"{k:02d}" / "art.done.json"
        write_json(marker, read_json(marker) | {"data_hash": read_json(prepared / "task.json")["test_hash"]})
    return run


def settings(address: str, model: str) -> JudgeConfig:
    known: dict[str, Any] = {"endpoint": address, "instructions": "brief", "request": {"max_completion_tokens": 96}}
    return JudgeConfig.model_validate(known | {"model": model, "concurrency": 4})


def test_whatever_an_untuned_model_says_is_a_verdict_on_the_scale_or_counted(tmp_path: Path) -> None:
    run, cells = judged_run(tmp_path), [(1, "art")]
    with vllm_server(tmp_path / "log") as address:
        config = settings(address, "tiny")
        judge_cells(judged_cells(run, cells, config), config, tmp_path / "cache", print)
    rows = read_jsonl(run / "judgements" / "01" / "art.jsonl")
    print([(row["outcome"], row["remark"], row["score"]) for row in rows])
    assert {row["outcome"] for row in rows} <= {"judged", "unreadable"} and len(rows) == 8
    for row in rows:
        judged = row["outcome"] == "judged"
        assert judged == (row["score"] is not None) and (judged or row["attempts"] == 3)
        assert not judged or all(0 <= row[key] <= 100 for key in ("logic", "grounding", "knowledge"))


@pytest.mark.slow
def test_a_tuned_judge_is_served_judges_a_run_and_is_measured_against_exact_ratings(
    tuned: Path, tmp_path: Path
) -> None:
    run, cells = judged_run(tmp_path), [(1, "art"), (2, "art")]
    folder = next((tuned / "stages").glob("01-*")) / "adapter"
    with vllm_server(tmp_path / "log", {"judge": folder}) as address:
        config = settings(address, "judge")
        judge_cells(judged_cells(run, cells, config), config, tmp_path / "cache", print)
        first = {cell: read_jsonl(run / "judgements" / f"{cell[0]:02d}" / "art.jsonl") for cell in cells}
        markers = [read_json(run / "judgements" / f"{k:02d}" / "art.done.json") for k in (1, 2)]
        judged = [marker["outcomes"]["judged"] for marker in markers]
        assert sum(judged) >= 8 and all(sum(marker["outcomes"].values()) == 8 for marker in markers)
        untuned = config.model_copy(update={"model": "tiny"})
        assert not any(cell.is_done() for cell in judged_cells(run, cells, untuned))  # another model, other scores

    samples = {sample["id"]: sample for sample in read_jsonl(run / "data" / "art" / "test.jsonl")}
    for k, count in zip((1, 2), judged, strict=True):
        answers = read_jsonl(run / "predictions" / f"{k:02d}" / "art.jsonl")
        rated = [{"id": row["id"], "ratings": rate(samples[row["id"]], row["think"])} for row in answers]
        write_jsonl(tmp_path / f"rated-{k}.jsonl", rated)
        found = agreement_files(run / "judgements" / f"{k:02d}" / "art.jsonl", tmp_path / f"rated-{k}.jsonl")
        print(found)
        assert (found["pairs"], found["unscored"], found["unrated"]) == (count, 8 - count, 0)

    (run / "judgements").rename(tmp_path / "before")  # the same again without a server: every reply was kept
    gone = config.model_copy(update={"endpoint": "http://127.0.0.1:9/v1"})
    judge_cells(judged_cells(run, cells, gone), gone, tmp_path / "cache", print)
    assert {cell: read_jsonl(run / "judgements" / f"{cell[0]:02d}" / "art.jsonl") for cell in cells} == first
