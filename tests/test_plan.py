"""`mcit plan`: what it says beforehand against what was measured afterwards."""

import json
from pathlib import Path

import published as shapes
import pytest
import torch
from publishing import run
from transformers import AutoModelForImageTextToText

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl, write_json, write_jsonl
from mcit.eval.serving import Serving, write_serving
from mcit.pipeline.planning.memory import NF4_BITS, disk, measure, policy_ranks, training_memory, weight_bytes
from mcit.pipeline.planning.pace import Pace, assumed_training, measured_answers, measured_training
from mcit.pipeline.planning.plan import Machine, Plan, known_runs, plan
from mcit.pipeline.planning.work import StageWork
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import ModelConfig, ModulesConfig
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
        assert row["memory"]["trained"] == 16 * trained["trained_parameters"]
    assert found["answers"] == sum(len(read_jsonl(path)) for path in (run / "predictions").glob("*/*[a-z].jsonl"))
    files = [file for part in ("adapter", "delta") for file in (run / "stages").glob(f"*/{part}/*") if file.is_file()]
    assert found["disk"]["adapters"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.2)
    assert found["disk"]["base_model"] == pytest.approx(
        (Path(load_recipe(run).base_model.path) / "model.safetensors").stat().st_size, rel=0.01
    )
    seconds = [read_json(run / "stages" / name / "done.json")["seconds"] for name in ("01-first", "02-second")]
    assert sum(row["seconds"] or 0 for row in found["stages"]) == pytest.approx(sum(seconds), rel=0.01)
    assert found["stages"][1]["memory"]["past"] > found["stages"][0]["memory"]["past"] == 0


def test_generations_of_grpo_are_counted(run):
    """6 prompts, 2 at a time with 2 completions each: 3 batches an epoch, 12 completions."""
    grpo = ["train.paradigm=rft", "train.reference=none", "train.global_batch_size=4", "method={}"]
    args = "train.rft.args={num_generations: 2, max_completion_length: 5, beta: 0.0, num_train_epochs: 2}"
    found = planned(run, *grpo, args)
    assert [(row["steps"], row["generations"]) for row in found["stages"]] == [(6, 24), (6, 24)]
    assert found["seconds"] is None and found["stages"][0]["seconds"] is None  # no GRPO was measured
    twice = planned(run, *grpo, args.replace("beta", "num_iterations: 2, beta"))
    assert [(row["steps"], row["generations"]) for row in twice["stages"]] == [(12, 24), (12, 24)]


def test_what_does_not_fit_is_said(run):
    assert planned(run, gpu_memory=24.0)["misfits"] == []
    small = planned(run, gpu_memory=0.008)["misfits"]
    assert [line.split(",")[0].rpartition(" in ")[0] for line in small[:2]] == ["stage 1 trains", "stage 2 trains"]
    assert "per_device_train_batch_size" in small[0] and "vLLM needs" in small[2] and "eval.max_model_len" in small[2]
    [ranks] = planned(run, "train.lora.r=400", gpu_memory=24.0)["misfits"]
    assert ranks.startswith("from stage 2 on policies have ranks above 512 (up to 800)")
    assert planned(run, measured=False)["seconds"] is None


def test_memory_is_what_an_h100_needed():
    """The shape of Qwen2.5-VL-3B as benchmarks/real_size.py trained it: 10.6 GiB, and 10.8 with one stage behind."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.published()["Qwen/Qwen2.5-VL-3B-Instruct"])
    found = measure(model, ModulesConfig())
    recipe = load_recipe(
        "mini/sequential",
        [
            *("base_model.dtype=bfloat16", "train.lineage=stack", "train.lora.r=64", "train.global_batch_size=16"),
            "train.sft.args={gradient_checkpointing: true}",
        ],
    )
    work = StageWork(256, 16, 256, 16 * 16 * 295, 295, 16, 0, 0)
    bench = json.loads((Path(__file__).parents[1] / "benchmarks" / "real_size.json").read_text())["stages"]
    peaks = {row["stage"]: row["peak_gib"] for row in bench if row["run"] == "sequential"}
    for k, name in ((1, "01-first"), (2, "02-second")):
        memory = training_memory(recipe, k, found, work, 1, "single")
        assert memory.total / 2**30 == pytest.approx(peaks[name], rel=0.05)
    assert 64 * found.adapted == pytest.approx(120e6, rel=0.01)
    zero3 = training_memory(recipe, 1, found, work, 4, "zero3")
    assert zero3.weights * 4 == training_memory(recipe, 1, found, work, 1, "single").weights
    nf4 = ModelConfig(path="x/y", quantization="nf4")
    whole = weight_bytes(found, ModelConfig(path="x/y"))
    assert weight_bytes(found, nf4) == whole - found.linear * (2 - NF4_BITS / 8)
    assert NF4_BITS == pytest.approx(4.127, abs=1e-3)


def test_ranks_and_disk_follow_the_lineage():
    def of(lineage: str) -> list[int]:
        return policy_ranks(load_recipe("mini/sequential", [f"train.lineage={lineage}", "train.lora.r=4"]))

    assert of("stack") == of("fold") == [4, 8, 12, 16, 20]
    assert of("continue") == of("independent") == [4] * 5
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.published()["Qwen/Qwen2.5-VL-3B-Instruct"])
    found = measure(model, ModulesConfig())
    sizes = {}
    for lineage in ("stack", "continue", "independent"):
        recipe = load_recipe("mini/sequential", [f"train.lineage={lineage}", "train.lora.r=4"])
        sizes[lineage] = disk(recipe, found) / (4 * found.adapted)  # in ranks
    assert sizes == {"stack": 60 + 20, "continue": 20 + 4 + 4 * 8, "independent": 20 + 20}


def test_paces_are_means_over_what_was_measured(tmp_path):
    base = Serving(stage=0, name="base", kind="base", base="b", base_hash="h", hash="h")
    write_serving(tmp_path / "run" / "stages" / "00-base", base)
    for k, (seconds, runtime, tokens) in enumerate([(30.0, 20.0, 1000), (52.0, 40.0, 2000)], 1):
        folder = tmp_path / "run" / "stages" / f"{k:02d}-task"
        train = {"paradigm": "sft", "global_batch_size": 2}
        write_json(folder / "done.json", {"seconds": seconds, "inputs": {"train": train}, "trained": {"steps": 5}})
        write_json(folder / "trained.json", {})
        write_jsonl(folder / "train_log.jsonl", [{"num_tokens": tokens}, {"train_runtime": runtime}])
    runs = [tmp_path / "run"]
    pace = measured_training(runs, "h", "sft")
    assert pace == Pace(11.0, 0.02, 2) and pace.seconds(500) == 21.0
    assert measured_training(runs, "other", "sft") is None and measured_training(runs, "h", "rft") is None
    for k, (seconds, n) in enumerate([(15.0, 10), (10.0, 20), (5.0, 10)]):
        write_json(tmp_path / "run" / "predictions" / f"{k:02d}" / "t.done.json", {"seconds": seconds, "n": n})
    assert measured_answers(runs, "h") == Pace(10.0, 0.5, 3)  # 30 s for 40 answers, of which 10 to start
    assert assumed_training(10**9, 100.0, True).each == pytest.approx(6e9 / 9e12)
    with pytest.raises(InputError, match="is no run"):
        known_runs([tmp_path])
