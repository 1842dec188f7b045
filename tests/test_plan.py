"""`mcit plan`: what it says beforehand against what was measured afterwards."""

from pathlib import Path

import pytest
import torch
from published import published
from publishing import run
from transformers import AutoModelForImageTextToText

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl, write_json, write_jsonl
from mcit.eval.serving import Serving, write_serving
from mcit.pipeline.methods import expand
from mcit.pipeline.planning.outlook import Passes, look_through
from mcit.pipeline.planning.pace import Pace, assumed_training, extra_tokens, measured_answers, measured_training
from mcit.pipeline.planning.plan import Machine, Plan, known_runs, plan
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.disk import run_needs
from mcit.pipeline.run.step import Launch

__all__ = ["run"]  # a fixture


def planned(run: Path, *overrides: str, gpu_memory: float | None = None, measured: bool = True) -> Plan:
    recipe = load_recipe(run.parent / "two.yaml", overrides)
    return plan(recipe, Machine(Launch.named("single"), gpu_memory, None), [run] if measured else [])


def test_steps_and_tokens_are_those_that_were_trained_and_disk_is_near(run):
    found = planned(run)
    for row, name in zip(found["stages"], ("01-first", "02-second"), strict=True):
        folder = run / "stages" / name
        trained, log = read_json(folder / "trained.json"), read_jsonl(folder / "train_log.jsonl")
        assert (row["samples"], row["steps"]) == (trained["samples"], trained["steps"])
        assert row["tokens"] == log[-1]["num_tokens"]
        assert row["memory"]["trained"] == 12 * trained["trained_parameters"]
    assert found["answers"] == sum(len(read_jsonl(path)) for path in (run / "predictions").glob("*/*[a-z].jsonl"))
    kept = ("adapter", "delta", "method")
    files = [file for part in kept for file in (run / "stages").glob(f"*/{part}/*") if file.is_file()]
    assert found["disk"]["stages"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.2)
    assert found["disk"]["base_model"] == pytest.approx(
        (Path(load_recipe(run).base_model.path) / "model.safetensors").stat().st_size, rel=0.01
    )
    seconds = [read_json(run / "stages" / name / "done.json")["seconds"] for name in ("01-first", "02-second")]
    assert sum(row["seconds"] or 0 for row in found["stages"]) == pytest.approx(sum(seconds), rel=0.01)
    assert found["stages"][1]["memory"]["past"] > found["stages"][0]["memory"]["past"] == 0


def test_general_tasks_are_asked_and_trained_nowhere(run):
    plain = planned(run)
    general = planned(run, f"eval.general=[{{name: beside, test: {run.parent / 'clinic-first.json'}, style: short}}]")
    assert general["tokens"] == plain["tokens"] and general["answers"] > plain["answers"]


def test_what_several_stages_rest_on_is_said_once(run):
    [note] = planned(run, measured=False)["notes"]
    assert note.startswith("stage 1, stage 2, answers: time not known. Train a stage with prepare.limit.train=64")


def test_generations_of_grpo_are_counted(run):
    """6 prompts, 2 at a time with 2 completions each: 3 batches an epoch, 12 completions."""
    grpo = ["train.paradigm=rft", "train.reference=none", "train.global_batch_size=4", "method={}"]
    args = "train.rft.args={num_generations: 2, max_completion_length: 5, beta: 0.0, num_train_epochs: 2}"
    found = planned(run, *grpo, args)
    assert [(row["steps"], row["generations"]) for row in found["stages"]] == [(6, 24), (6, 24)]
    assert found["seconds"] is None and found["stages"][0]["seconds"] is None  # no GRPO was measured
    twice = planned(run, *grpo, args.replace("beta", "num_iterations: 2, beta"))
    assert [(row["steps"], row["generations"]) for row in twice["stages"]] == [(12, 24), (12, 24)]


def test_what_methods_take_is_counted(run):
    """DER replays the first stage in the second, from states that a plan does not have."""
    plain, der = (planned(run, f"method={method}") for method in ("{}", "{der: {buffer: 4, per_batch: 2, top: 3}}"))
    first, second = (
        (mine["tokens"], others["tokens"]) for mine, others in zip(der["stages"], plain["stages"], strict=True)
    )
    assert first[0] == first[1]
    assert second[0] - second[1] == pytest.approx(second[1], rel=0.2)  # batches of two, and two beside them
    kept = der["disk"]["stages"] - plain["disk"]["stages"]
    answer = 2  # tokens: a colour and the end of the turn
    assert kept == pytest.approx(2 * 4 * answer * 3 * 6, rel=0.5)
    lwf, ewc = (planned(run, f"method={{{name}: {{}}}}", "train.lineage=continue") for name in ("lwf", "ewc"))
    trained = plain["stages"][0]["memory"]["trained"] / 12
    assert [row["memory"]["methods"] for row in ewc["stages"]] == [0, 8 * trained]
    assert all(row["memory"]["methods"] > 4 * trained for row in lwf["stages"])


def test_answers_are_counted_in_all_ways_and_judged_where_there_is_reasoning(run):
    plain = planned(run)
    held = sum(len(read_jsonl(path)) for path in (run / "predictions").glob("*/*[a-z].jsonl"))
    assert plain["answers_again"] <= held and plain["judged"] == 0
    assert planned(run, "eval.constrained=false")["answers_again"] == 0
    probed = planned(run, "eval.constrained=false", "eval.image_probe=1")
    assert probed["answers_again"] == 2 * len(list((run / "predictions").glob("*/*.done.json")))
    judge = "eval.judge={endpoint: http://localhost:1/v1, model: m, samples: 1, request: {max_completion_tokens: 7}}"
    think = [f"stream.{task}.reasoning=think" for task in ("first", "second")]
    asked = planned(run, judge, *think)
    cells = len(list((run / "predictions").glob("*/*.done.json")))
    assert (asked["judged"], asked["judged_tokens"]) == (cells, 7 * cells)


def test_what_does_not_fit_is_said(run):
    assert planned(run, gpu_memory=24.0)["misfits"] == []
    small = planned(run, gpu_memory=0.008)["misfits"]
    assert [line.split(",")[0].rpartition(" in ")[0] for line in small[:2]] == ["stage 1 trains", "stage 2 trains"]
    assert "per_device_train_batch_size" in small[0] and "vLLM needs" in small[2] and "eval.max_model_len" in small[2]
    [copies] = [note for note in planned(run, "train.lora.r=400")["notes"] if "ranks" in note]
    assert copies.startswith("1 policies have ranks above 512 (up to 800), which vLLM serves as merged copies")
    assert planned(run, measured=False)["seconds"] is None


def test_ranks_and_disk_follow_the_lineage():
    def of(lineage: str, entering: int = 0, behind: int = 0) -> tuple[list[int], float]:
        """Ranks, and disk in ranks."""
        recipe = load_recipe("mini/sequential", [f"train.lineage={lineage}", "train.lora.r=4"])
        found = list(look_through(recipe, model, entering, behind))
        return [one.rank for one in found], run_needs(recipe, found).kept / (4 * found[0].width)

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(published()["Qwen/Qwen2.5-VL-3B-Instruct"])
    assert of("stack") == of("fold") == ([4, 8, 12, 16, 20], 60 + 20)
    assert of("continue") == ([4] * 5, 20 + 4 + 4 * 8)
    assert of("continue", 4, 1) == ([4] * 5, 20 + 5 * 8)
    assert of("independent") == ([4] * 5, 20 + 20)
    assert of("stack", 6, 2) == ([10, 14, 18, 22, 26], 90 + 20)


def measured_run(run: Path, method: dict[str, object], seconds: float, runtime: float, processes: int = 1) -> Path:
    """A run of one stage of 1,000 tokens."""
    base = Serving(stage=0, name="base", kind="base", base="b", base_hash="h", hash="h")
    write_serving(run / "stages" / "00-base", base)
    folder = run / "stages" / "01-task"
    train = {"paradigm": "sft", "global_batch_size": 2}
    trained = {"steps": 5, "processes": processes}
    marker = {"seconds": seconds, "inputs": {"train": train, "method": method}, "trained": trained}
    write_json(folder / "done.json", marker)
    write_json(folder / "trained.json", {})
    write_jsonl(folder / "train_log.jsonl", [{"num_tokens": 800, "num_places": 1000}, {"train_runtime": runtime}])
    return run


def test_paces_are_means_over_what_was_measured(tmp_path):
    runs = [measured_run(tmp_path / "one", {}, 30.0, 20.0), measured_run(tmp_path / "two", {}, 42.0, 30.0, 2)]
    pace = measured_training(runs, "h", "sft", {})
    assert pace == Pace(11.0, 0.04, 2, passes=False)  # 20 s, and 30 s of two processes, for 2,000 tokens
    assert pace.seconds(500) == 31.0 and pace.seconds(500, processes=2) == 21.0
    assert measured_training(runs, "other", "sft", {}) is None and measured_training(runs, "h", "rft", {}) is None
    for k, (seconds, n) in enumerate([(15.0, 10), (10.0, 20), (5.0, 10)]):
        write_json(runs[0] / "predictions" / f"{k:02d}" / "t.done.json", {"seconds": seconds, "n": n})
    assert measured_answers(runs, "h") == Pace(10.0, 0.5, 3)  # 30 s for 40 answers, of which 10 to start
    assert assumed_training(10**9, 100.0, True).each == pytest.approx(6e9 / 9e12)
    with pytest.raises(InputError, match="is no run"):
        known_runs([tmp_path])


def test_the_pace_of_rft_is_that_of_a_completion(tmp_path):
    run = measured_run(tmp_path / "rft", {"asd": {"fraction": 0.2}}, 50.0, 40.0)
    marker = read_json(run / "stages" / "01-task" / "done.json")
    for own, each in ((None, 40 / (5 * 2)), (64, 40 / (5 * 64))):
        marker["inputs"]["train"] |= {"paradigm": "rft", "rft": {"global_batch_size": own}}
        write_json(run / "stages" / "01-task" / "done.json", marker)
        assert measured_training([run], "h", "rft", {}).each == pytest.approx(each)
    assert measured_training([run], "h", "sft", {}) is None


def test_what_methods_do_beside_training_is_measured_with_them_or_added(tmp_path):
    """LwF looks at every sample once more: a third of what training takes with checkpointing, half of it without."""
    plain, lwf = {"asd": {}}, {"lwf": {}}
    slow = measured_run(tmp_path / "lwf", expand(lwf), 34.0, 30.0)
    fast = measured_run(tmp_path / "asd", expand(plain), 22.0, 20.0)
    assert measured_training([slow, fast], "h", "sft", lwf) == Pace(4.0, 0.03, 1, passes=False)
    assert measured_training([fast], "h", "sft", lwf) == Pace(2.0, 0.02, 1, passes=True)
    assert measured_training([slow], "h", "sft", {}) is None  # its pace is another's
    looks = Passes(forward=600, gradients=100, products=50)
    assert extra_tokens(looks, checkpointing=True) == 350 and extra_tokens(looks, checkpointing=False) == 450
    assert extra_tokens(looks, checkpointing=True, filled=1.5) == 500
