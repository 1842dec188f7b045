"""MoExtend in real stages: what is trained, saved, served and carried on."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_llava_mixtral
from rich.console import Console
from safetensors.torch import load_file
from test_families import VLLM, questions
from tiny_moe import build_model, build_processor
from training import make_run, make_samples, uneven
from transformers import AutoModelForImageTextToText, AutoProcessor

import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.engines import generate, make_engine, read_policy
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.engines.vllm import VllmEngine
from mcit.eval.liveness import engine_scores, prove, transformers_scores
from mcit.eval.serving import read_serving
from mcit.pipeline.methods.moextend import MoExtend, _restore
from mcit.pipeline.methods.moextend.models import blocks_of, save
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.collator import Collator

RECIPE = """
method: {moextend: {experts: 2, layers: [1], router_steps: 5}}
train:
  global_batch_size: 8
  lora: {r: 4, alpha: 8, dropout: 0}
  sft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, max_steps: 3, logging_steps: 1,
               gradient_checkpointing: false}}
"""
IDS = torch.tensor([[10, 20, 30, 40, 50]])
MIXTURES = FAMILIES | {"llava_mixtral": save_llava_mixtral}
EXPERTS = "model.language_model.layers.{}.mlp.{}"


Tasks = dict[str, list[Sample]]


def new_run(folder: Path, family: str, tasks: Tasks | None = None, anchors: Tasks | None = None) -> Path:
    """A run with its data and base; returns the recipe's path, beside which everything is."""
    MIXTURES[family](folder / "base")
    usual = {"colour": uneven("colour", 20, 1), "words": uneven("words", 19, 0)}
    return make_run(folder / "run", tasks or usual, RECIPE, folder / "base", anchors or {})


def tuned(recipe: Path, k: int, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Train a stage: its folder, and what was seen of it as training left it, before it was merged."""
    seen: dict[str, Any] = {}
    leave = MoExtend.leave

    def look(self: Any, model: Any, *rest: Any) -> None:
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=IDS).logits
        seen["trained"] = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        leave(self, model, *rest)

    run = recipe.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoExtend, "leave", look)
        run_stage(load_recipe(recipe, overrides), k, run, "sft", sft.make_trainer)
    return run / "stages" / ("01-colour", "02-words")[k - 1], seen


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state_of(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "method" / "moextend.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(the recipe of a run on Qwen3-VL-MoE, its first stage, what was seen of that)."""
    recipe = new_run(tmp_path_factory.mktemp("trained"), "qwen3_vl_moe")
    return recipe, *tuned(recipe, 1)


def copied(trained: tuple[Path, Path, dict[str, Any]], to: Path) -> Path:
    """The recipe in a run of its own that shares data and first stage."""
    run = trained[0].parent
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(run / "data")
    for name in ("00-base", "01-colour"):
        (to / "stages" / name).symlink_to(run / "stages" / name)
    (to / trained[0].name).write_text(trained[0].read_text())
    return to / trained[0].name


def test_a_stage_trains_new_experts_alone_and_serves_a_merged_model(trained: Any) -> None:
    recipe, stage, seen = trained
    assert seen["trained"] == [
        EXPERTS.format(1, name) for name in ("experts.new.down_proj", "experts.new.gate_up_proj", "gate.rows")
    ]
    assert {path.name for path in stage.iterdir()} == {
        *("merged", "method", "serving.json", "train_log.jsonl", "trained.json")
    }
    serving = read_serving(stage)
    assert (serving.kind, serving.path, serving.rank, serving.base_hash) == ("merged", "merged", None, "b")
    assert read_json(stage / "trained.json")["trained_parameters"] == 2 * (3 * 48 * 64 + 64)
    torch.testing.assert_close(logits(stage / "merged"), seen["logits"], rtol=0, atol=1e-6)

    base, merged = tensors(recipe.parents[1] / "base"), tensors(stage / "merged")
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        extended = ".experts." in name or ".mlp.gate." in name
        assert tensor.shape[0] == base[name].shape[0] + 2 * extended
        assert torch.equal(tensor[: base[name].shape[0]], base[name]), name  # the old ones in their places, to the bit
    written, published = (
        read_json(folder / "config.json") for folder in (stage / "merged", recipe.parents[1] / "base")
    )
    for config in (written, published):
        assert config["text_config"].pop("num_local_experts") == (6 if config is written else 4)
    assert written == published


def test_what_is_kept_of_a_stage_is_small_and_gives_it_back_exactly(trained: Any) -> None:
    """Trained experts in full, of the untrained ones which they are copies of."""
    recipe, stage, _ = trained
    state = state_of(stage)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "001.000.sources": (2,),
        "001.001.gate_up": (2, 96, 64),
        "001.001.down": (2, 64, 48),
        "001.001.rows": (2, 64),
    }
    model = AutoModelForImageTextToText.from_pretrained(recipe.parents[1] / "base", dtype=torch.float32)
    _restore(blocks_of(model, "all"), state)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(stage / "merged"))
    merged = tensors(stage / "merged")
    sources = state["001.000.sources"].tolist()
    idle = merged[EXPERTS.format(0, "experts.down_proj")]
    assert torch.equal(idle[4:], idle[sources]) and len(set(sources)) == 2


def test_the_next_stage_adds_to_what_is_there(trained: Any, tmp_path: Path) -> None:
    first = trained[1]
    stage, seen = tuned(copied(trained, tmp_path), 2, "method.moextend.layers=all")
    before, after = tensors(first / "merged"), tensors(stage / "merged")
    for name, tensor in after.items():
        extended = ".experts." in name or ".mlp.gate." in name
        assert tensor.shape[0] == before[name].shape[0] + 2 * extended
        assert torch.equal(tensor[: before[name].shape[0]], before[name]), name
    old, new = state_of(first), state_of(stage)
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())
    assert {key for key in new if key not in old} == {
        f"002.00{i}.{part}" for i in (0, 1) for part in ("gate_up", "down", "rows")
    }
    torch.testing.assert_close(logits(stage / "merged"), seen["logits"], rtol=0, atol=1e-6)
    assert (seen["logits"] - trained[2]["logits"]).abs().max() > 1e-3


def test_independent_stages_start_from_the_base(trained: Any, tmp_path: Path) -> None:
    stage, _ = tuned(copied(trained, tmp_path), 2, "train.lineage=independent")
    assert all(key.startswith("001.") for key in state_of(stage))  # the only ones that the policy has
    assert read_json(stage / "merged" / "config.json")["text_config"]["num_local_experts"] == 6


def test_a_share_of_the_layers_is_found_by_the_shift_of_usage(trained: Any, tmp_path: Path) -> None:
    stage, seen = tuned(copied(trained, tmp_path), 2, "method.moextend.layers=0.5")
    state = state_of(stage)
    [idle] = {0, 1} - {int(name.split(".")[3]) for name in seen["trained"]}
    assert f"002.00{idle}.sources" in state and f"002.00{1 - idle}.rows" in state


def test_a_frozen_weight_that_changes_is_found(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, finish = copied(trained, tmp_path), MoExtend.finish

    def meddle(self: Any, model: Any, samples: Any) -> Any:
        weight = model.lm_head.weight.data
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
        return finish(self, model, samples)

    monkeypatch.setattr(MoExtend, "finish", meddle)
    with pytest.raises(RuntimeError, match=r"1 frozen weights were changed by training, the first: lm_head.weight"):
        run_stage(load_recipe(recipe), 2, recipe.parent, "sft", sft.make_trainer)


def test_processes_that_chose_differently_are_found(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = copied(trained, tmp_path)
    monkeypatch.setattr("mcit.pipeline.methods.moextend.gather_object", lambda mine: [*mine, {0: [1, 2], 1: [3, 2]}])
    with pytest.raises(RuntimeError, match="the processes measured different usage"):
        run_stage(load_recipe(recipe), 2, recipe.parent, "sft", sft.make_trainer)


@pytest.mark.slow
def test_freezing_alone_does_not_keep_what_was_learned(tmp_path: Path) -> None:
    """Tokens of a task go to the next one's experts too, which is why old samples are to be mixed in."""
    tasks = {"words": make_samples("words", 16, images=0), "colour": make_samples("colour", 16, images=1)}
    recipe = new_run(tmp_path, "qwen3_vl_moe", tasks, {"old": make_samples("old", 16, images=0)})
    samples = read_jsonl(recipe.parent / "data" / "words" / "train.jsonl")
    batch = Collator(AutoProcessor.from_pretrained(tmp_path / "base"), [], 256).collate(samples)

    def stage_loss(k: int, *overrides: str) -> float:
        """Train a stage and measure the loss on `words`."""
        more = ["global_batch_size=16", "sft.args.optim=adamw_torch", "sft.args.learning_rate=1e-2"]
        overrides = (*overrides, *(f"train.{setting}" for setting in (*more, "sft.args.max_steps=40")))
        settled = load_recipe(recipe, ["method.moextend.layers=all", *overrides])
        run_stage(settled, k, recipe.parent, "sft", sft.make_trainer)
        folder = recipe.parent / "stages" / settled.stages[k - 1].folder / "merged"
        with torch.no_grad():
            return AutoModelForImageTextToText.from_pretrained(folder)(**batch).loss.item()

    assert stage_loss(1) < 0.1
    assert stage_loss(2) > 1
    assert stage_loss(2, "stream=[words, [words, colour]]") < 0.1
    assert stage_loss(2, "method.gere={per_batch: 16, weight: 0}") < 0.1


def test_gere_s_base_is_not_the_mixture_with_fresh_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of the base are those that any run on it makes, and shares."""
    recipe = new_run(tmp_path, "qwen3_vl_moe", anchors={"old": make_samples("old", 4, images=0)})
    made = []
    for name, method in (("lora", ""), ("experts", ", moextend: {}")):
        monkeypatch.setenv("MCIT_CACHE", str(tmp_path / name))
        overrides = [f"method={{gere: {{per_batch: 2, match: l2}}{method}}}", "train.sft.args.max_steps=1"]
        run_stage(load_recipe(recipe, overrides), 1, recipe.parent, "sft", sft.make_trainer)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name / "anchors").iterdir()})
    assert made[0] == made[1] and len(made[0]) == 1


def test_what_does_not_fit_is_refused(trained: Any, tmp_path: Path) -> None:
    recipe = copied(trained, tmp_path)
    with pytest.raises(InputError, match="works with paradigm sft, not rft"):
        load_recipe(recipe, ["train.paradigm=rft"])
    with pytest.raises(InputError, match="works with lineage stack or independent, not fold"):
        load_recipe(recipe, ["train.lineage=fold"])
    with pytest.raises(InputError, match=r"serving.json: is a merged model, and a stage starts from the base"):
        run_stage(load_recipe(recipe, ["method={}"]), 2, recipe.parent, "sft", sft.make_trainer)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("qwen3_vl_moe", "0.5"),
        pytest.param("qwen3_vl", "[1]", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", "all", marks=pytest.mark.slow),
        pytest.param("llava_mixtral", "all", marks=pytest.mark.slow),
    ],
)
def test_vllm_answers_as_the_model_in_training_did(family: str, layers: str, tmp_path: Path) -> None:
    """Two stages; log-probabilities and greedy answers of vLLM are those of transformers, with images and without."""
    recipe = new_run(tmp_path, family)
    more = [f"method.moextend.layers={layers}", "train.sft.args.optim=adamw_torch", "train.sft.args.learning_rate=2e-2"]
    for k in (1, 2):
        stage, seen = tuned(recipe, k, *more)
        torch.testing.assert_close(logits(stage / "merged"), seen["logits"], rtol=0, atol=1e-5)
        experts = (1 if family == "qwen3_vl" else 4) + 2 * k
        assert read_json(stage / "merged" / "config.json")["text_config"]["num_local_experts"] == experts
    if layers == "[1]":
        text = read_json(stage / "merged" / "config.json")["text_config"]
        assert text["mlp_only_layers"] == [0]
        base, merged = tensors(tmp_path / "base"), tensors(stage / "merged")
        assert all(torch.equal(merged[name], base[name]) for name in base if ".layers.1.mlp." not in name)
        mlp = [base[EXPERTS.format(1, f"{part}_proj.weight")] for part in ("gate", "up", "down")]
        assert torch.equal(merged[EXPERTS.format(1, "experts.gate_up_proj")][0].T, torch.cat(mlp[:2]))
        assert torch.equal(merged[EXPERTS.format(1, "experts.down_proj")][0].T, mlp[2])
    policy = read_policy(stage)
    asked = [request._replace(policy=policy) for request in questions(policy)]
    reference = transformers_scores([policy], asked, VLLM)
    engine = make_engine([policy], VLLM, 2)
    assert isinstance(engine, VllmEngine)
    try:
        [proof] = prove([policy], "vllm", engine_scores(engine, [policy], asked), reference, VLLM)
        assert generate(engine, asked, 8) == generate(TransformersEngine([policy], VLLM), asked, 8)
    finally:
        engine.close()
    assert proof["effect"] > 0.01 and proof["gap_max"] < 1e-4
    assert proof["note"].startswith("stage 2 (words, a merged model): acts")


@pytest.mark.slow
def test_a_run_of_the_tiny_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mini/moe` from data to report, by vLLM; again, nothing is left to do."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    processor = build_processor()
    model = build_model(processor.tokenizer)
    save(model, processor, blocks_of(model, "all"), tmp_path / "tiny_moe")
    overrides = [f"base_model.path={tmp_path / 'tiny_moe'}", "stream=[digits, arithmetic]", "eval.engine=vllm"]
    overrides += ["prepare.limit={train: 16, test: 4}", "eval.during={dense: 1, probes: 4}"]
    terminal, done = Terminal(Console(file=io.StringIO(), width=200)), []
    for _ in range(2):
        run = start_run(load_recipe("mini/moe", overrides), tmp_path / "run", Launch.named("single"), terminal)
        perform_steps(run, run.steps(), terminal)
        done.append({step.name: step.marker.read_text() for step in run.steps()})
    assert done[0] == done[1]
    results = read_json(tmp_path / "run" / "results.json")
    assert len(results["matrix"]) == 3 and results["metrics"]["MFN"] is not None
    for name in ("01-digits", "02-arithmetic"):
        stage = tmp_path / "run" / "stages" / name
        proof = read_json(stage / "liveness.json")
        assert (stage / "during.json").exists() and read_serving(stage).kind == "merged"
        assert proof["engine"] == "vllm" and proof["gap_max"] < 1e-4
    assert (tmp_path / "run" / "report" / "index.html").exists()
