"""A real GRPO stage on top of a supervised one, under lineage `stack`, with images and without."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training import COLOURS, launch, make_run, make_samples, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.lora import load_adapter
from mcit.eval.serving import read_serving
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.reinforcement.prompts import check_roles
from mcit.pipeline.reinforcement.rewards import Rewards
from mcit.pipeline.reinforcement.trainer import StageGRPOTrainer
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.arguments import make_config
from mcit.pipeline.training.collator import Collator
from mcit.pipeline.training.trainer import MethodLoss

RECIPE = """
method: {reglora: {weight: 100}}
train:
  lora: {r: 4, alpha: 8, dropout: 0.1}
  global_batch_size: 16
  sft: {args: {learning_rate: 1e-2, lr_scheduler_type: constant, max_steps: 25, gradient_checkpointing: false}}
  rft:
    args: {learning_rate: 1e-3, beta: 0.1, num_generations: 4, max_completion_length: 6, max_steps: 3, logging_steps: 1,
           temperature: 0.5, gradient_checkpointing: false}
"""
RFT = ("train.paradigm=rft",)
IDS = torch.tensor([[10, 20, 30, 40, 50]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Colours with images, taught in stage 1; the same again and a text-only task for stages 2 and 3.

    Half of stage 1 is taught wrongly: a policy that is always right, or never, has nothing to learn from rewards.
    """
    run = tmp_path_factory.mktemp("run")
    samples = {
        name: make_samples(name, n, images=j) for name, n, j in [("colour", 32, 1), ("again", 12, 1), ("words", 12, 0)]
    }
    for sample in samples["colour"][::2]:
        colour = COLOURS.index(sample["references"][0])
        sample["completion"] = [{"role": "assistant", "content": COLOURS[colour - 1]}]
    recipe = make_run(run, samples, RECIPE)
    run_stage(load_recipe(recipe), 1, run, "sft", sft.make_trainer)
    return run, recipe


def copy_run(trained: tuple[Path, Path], to: Path) -> Path:
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(trained[0] / "data")
    for name in ("00-base", "01-colour"):
        (to / "stages" / name).symlink_to(trained[0] / "stages" / name)
    return to


def reinforce(run: Path, recipe: Path, k: int, *overrides: str) -> PeftModel:
    kept: dict[str, Any] = {}

    def make(entered: Any) -> Any:
        kept["model"] = entered.model
        return rft.make_trainer(entered)

    run_stage(load_recipe(recipe, [*RFT, *overrides]), k, run, "rft", make)
    return kept["model"].eval()


def test_stack_with_grpo(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Reference = previous policy, base bit-identical, and the adapter on the untouched base is the policy."""
    run, recipe = copy_run(trained, tmp_path), trained[1]
    for k, (before, after) in enumerate([("01-colour", "02-again"), ("02-again", "03-words")], 2):
        model = reinforce(run, recipe, k)
        log = read_jsonl(run / "stages" / after / "train_log.jsonl")
        assert abs(log[0]["kl"]) < 1e-4  # nats per token; the policy has not moved yet
        assert max(abs(row["kl"]) for row in log[1:-1]) > 0
        assert any(row["reward_std"] > 0 for row in log[:-1])
        with torch.no_grad():
            served = PeftModel.from_pretrained(tiny_model(), run / "stages" / after / "adapter").eval()
            torch.testing.assert_close(served(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-4)
            entered = PeftModel.from_pretrained(tiny_model(), run / "stages" / before / "adapter").eval()
            with model.disable_adapter():
                torch.testing.assert_close(
                    model(input_ids=IDS).logits, entered(input_ids=IDS).logits, rtol=0, atol=1e-4
                )
        state = {
            re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor
            for name, tensor in model.state_dict().items()
            if "lora_" not in name
        }
        untouched = tiny_model().state_dict()
        assert state.keys() == untouched.keys() and all(torch.equal(state[name], untouched[name]) for name in untouched)
        delta = load_adapter(run / "stages" / after / "delta")
        assert len(delta) == 35 and any(factors.b.any() for factors in delta.values())
    assert read_json(run / "stages" / "03-words" / "serving.json")["rank"] == 12


def test_being_asked_while_it_trains_changes_nothing(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """To the bit, though answers are sampled in between."""
    weights = []
    for name, overrides in (("asked", ["eval.during={dense: 1, probes: 2}"]), ("unasked", [])):
        run = copy_run(trained, tmp_path / name)
        reinforce(run, trained[1], 2, *overrides)
        weights.append(load_file(run / "stages" / "02-again" / "delta" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    curves = read_json(tmp_path / "asked" / "stages" / "02-again" / "during.json")
    assert curves["steps"] == [0, 1, 3] and list(curves["tasks"]) == ["colour", "again"]


FULL = ("train.lineage=full", "train.modules.language=full")


@pytest.mark.slow
@pytest.mark.parametrize("lineage", ["stack", "fold", "continue", "independent", "full"])
@pytest.mark.parametrize("reference", ["previous", "base", "none"])
def test_every_reference_with_every_lineage(
    trained: tuple[Path, Path], tmp_path: Path, lineage: str, reference: str
) -> None:
    """KL to both policies is logged whichever is the reference; TRL's `kl`, the penalised one, is to that."""
    run, recipe = copy_run(trained, tmp_path), trained[1]
    overrides = ["method={}", f"train.lineage={lineage}", f"train.reference={reference}"]
    overrides += FULL if lineage == "full" else []
    if lineage == "independent":  # the base is right in nothing
        overrides += ["train.rft.rewards={'test_rewards:brevity': 1.0}"]
    reinforce(run, recipe, 2, *overrides, *(["train.rft.args.beta=0.0"] if reference == "none" else []))
    first, *_, last, _ = read_jsonl(run / "stages" / "02-again" / "train_log.jsonl")
    assert abs(first["kl_previous"]) < 1e-4 and last["kl_previous"] > 1e-5
    if lineage == "independent":  # it begins with the base
        assert first["kl_base"] == first["kl_previous"]
    else:
        assert first["kl_base"] > 1e-2  # stage 1 moved the policy away from it
    if reference == "none":
        assert "kl" not in first
    else:
        assert [row["kl"] for row in (first, last)] == pytest.approx([row[f"kl_{reference}"] for row in (first, last)])


def test_the_loss_is_trls_own(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Under `stack` TRL's own reference is the previous policy: trained by TRL alone, the same weights to the bit."""

    class Plain(MethodLoss, GRPOTrainer):
        _get_train_sampler = StageGRPOTrainer._get_train_sampler

    def by_trl(entered: Any) -> Any:
        kept["model"] = entered.model
        entered.processor.tokenizer.padding_side = "left"
        rewards = Rewards(entered.tasks, entered.stage.train.rft.rewards, rft._end_tokens(entered))
        trainer = Plain(
            model=entered.model,
            reward_funcs=rewards.functions,
            args=make_config(entered, {"reward_weights": [0.9, 0.1], "use_bias_correction_kl": False}),
            train_dataset=rft.prompt_dataset(entered.samples),
            processing_class=entered.processor,
            callbacks=entered.callbacks,
        )
        assert trainer.beta == 0.1
        trainer.has_images = [True] * len(entered.samples)
        return trainer

    kept: dict[str, Any] = {}
    ours, trls = (copy_run(trained, tmp_path / name) for name in ("ours", "trls"))
    more = ("method={}", "train.rft.args.num_iterations=2", "train.rft.args.use_bias_correction_kl=false")
    reinforce(ours, trained[1], 2, *more)
    run_stage(load_recipe(trained[1], [*RFT, *more]), 2, trls, "rft", by_trl)
    one, two = (load_file(run / "stages" / "02-again" / "delta" / "adapter_model.safetensors") for run in (ours, trls))
    assert any(tensor.any() for tensor in one.values()) and all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_jsonl(run / "stages" / "02-again" / "train_log.jsonl")[:-1] for run in (ours, trls)]
    for key in ("kl", "loss", "reward"):
        assert [row.get(key) for row in logs[0]] == [row.get(key) for row in logs[1]]


def test_full_tuning_leaves_a_whole_model_that_the_next_stage_enters(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """It enters the LoRA of stage 1; the model it leaves is the policy, and the reference of the stage after."""
    run, recipe = copy_run(trained, tmp_path), trained[1]
    before = PeftModel.from_pretrained(tiny_model(), run / "stages" / "01-colour" / "adapter").eval()
    for k, name in ((2, "02-again"), (3, "03-words")):
        model = reinforce(run, recipe, k, "method={}", *FULL, "train.rft.args.learning_rate=1e-4")
        log = read_jsonl(run / "stages" / name / "train_log.jsonl")
        assert abs(log[0]["kl_previous"]) < 1e-4 and log[0]["kl_base"] > 1e-2
        serving = read_serving(run / "stages" / name)
        assert (serving.kind, serving.path, serving.rank) == ("merged", "merged", None)
        served = AutoModelForImageTextToText.from_pretrained(run / "stages" / name / "merged", dtype=torch.float32)
        with torch.no_grad():
            logits = served.eval()(input_ids=IDS).logits
            torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)
            assert not torch.allclose(logits, before(input_ids=IDS).logits, atol=1e-4)
        assert {path.name for path in (run / "stages" / name).iterdir()} == {
            *("merged", "serving.json", "train_log.jsonl", "trained.json")
        }
        before = served
    with pytest.raises(InputError, match="is a merged model, and a stage starts from the base or an adapter on it"):
        reinforce(link_stage(run, tmp_path / "next", "03-words"), recipe, 3, "method={}")


def link_stage(run: Path, to: Path, name: str) -> Path:
    """A run whose second stage is another run's stage `name`."""
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(run / "data")
    (to / "stages" / "00-base").symlink_to(run / "stages" / "00-base")
    (to / "stages" / "02-again").symlink_to(run / "stages" / name)
    return to


@pytest.mark.parametrize(
    "lineage", ["stack", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fold", "continue", "full"))]
)
def test_sft_then_grpo_is_one_stage(trained: tuple[Path, Path], tmp_path: Path, lineage: str) -> None:
    """GRPO trains on what SFT has trained, and its reference is what SFT ended with."""
    run, recipe = copy_run(trained, tmp_path), trained[1]
    both = ("train.paradigm=sft+rft", f"train.lineage={lineage}", "method={}", *(FULL if lineage == "full" else ()))
    both += ("train.sft.args.max_steps=5", "train.sft.args.learning_rate=1e-3", "train.rft.global_batch_size=8")
    both += ("train.rft.args.temperature=2.0",)
    with pytest.raises(InputError, match=r"stage 2 has no sft yet. Start pipeline/sft.py"):
        reinforce(run, recipe, 2, *both)
    run_stage(load_recipe(recipe, both), 2, run, "sft", sft.make_trainer)
    folder = run / "stages" / "02-again"
    half = run / "stages" / ".02-again.sft"
    assert not folder.exists() and half.exists()
    written = (half / "trained.json").stat().st_mtime_ns
    run_stage(load_recipe(recipe, both), 2, run, "sft", sft.make_trainer)  # as after a GRPO that failed
    assert (half / "trained.json").stat().st_mtime_ns == written
    reinforce(run, recipe, 2, *both)
    assert {path.name for path in (run / "stages").iterdir()} == {"00-base", "01-colour", "02-again"}
    log = read_jsonl(folder / "train_log.jsonl")
    sft_rows, rft_rows = [row for row in log if "reward" not in row], [row for row in log if "reward" in row]
    assert sft_rows and abs(rft_rows[0]["kl_previous"]) < 1e-4 < 1e-2 < rft_rows[0]["kl_base"]
    summary = read_json(folder / "trained.json")
    assert (summary["sft"]["steps"], summary["steps"]) == (5, 3)
    if lineage == "stack":
        assert {factors.a.shape[0] for factors in load_adapter(folder / "delta").values()} == {4}
        assert read_serving(folder).rank == 8


def test_rloo_weighs_an_answer_against_the_others_to_its_prompt(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, recipe = copy_run(trained, tmp_path), trained[1]
    seen: list[tuple[list[float], list[float]]] = []

    def make(entered: Any) -> Any:
        entered.processor.tokenizer.padding_side = "right"  # which would corrupt positions
        trainer = rft.make_trainer(entered)
        assert trainer.processing_class.tokenizer.padding_side == "left"
        compute_loss = trainer.compute_loss

        def watched(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            loss = compute_loss(model, inputs, *rest, **more)
            rewards = [0.9 * a + 0.1 * f for a, f in zip(*map(list, trainer._logs["rewards"].values()), strict=True)]
            seen.append((inputs["advantages"].tolist(), rewards))
            return loss

        trainer.compute_loss = watched
        return trainer

    run_stage(load_recipe(recipe, [*RFT, "method={}", "train.rft.algorithm=rloo"]), 2, run, "rft", make)
    assert len(seen) == 3
    for advantages, rewards in seen:
        groups = [rewards[i : i + 4] for i in range(0, 16, 4)]
        wanted = [r - (sum(group) - r) / 3 for group in groups for r in group]
        assert sorted(advantages) == pytest.approx(sorted(wanted), abs=1e-5)
    assert any(max(advantages) > 0.1 for advantages, _ in seen)


def test_the_penalty_does_not_depend_on_the_accumulation_split(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """16 × 1 against 4 × 4: the same rollouts, the same RegLoRA term, the same weights."""
    runs = [copy_run(trained, tmp_path / name) for name in ("whole", "split")]
    for run, per_device in zip(runs, (16, 4), strict=True):
        settings = {"per_device_train_batch_size": per_device, "optim": "sgd", "learning_rate": 0.2}
        reinforce(run, trained[1], 2, *(f"train.rft.args.{key}={value}" for key, value in settings.items()))
    logs = [read_jsonl(run / "stages" / "02-again" / "train_log.jsonl")[:-1] for run in runs]
    for key in ("loss", "reglora_loss", "reward", "grad_norm"):  # TRL logs kl as a mean over micro-batches
        assert [row[key] for row in logs[0]] == pytest.approx([row[key] for row in logs[1]], rel=1e-3, abs=1e-6), key
    assert logs[0][0]["reglora_loss"] == 0 < logs[0][-1]["reglora_loss"]
    adapters = [load_adapter(run / "stages" / "02-again" / "adapter") for run in runs]
    for name, factors in adapters[0].items():
        torch.testing.assert_close(factors.delta(), adapters[1][name].delta(), rtol=0, atol=1e-5)


def test_a_wrong_reference_is_noticed(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    run, recipe = copy_run(trained, tmp_path), trained[1]
    right = rft.References.under
    monkeypatch.setattr(rft.References, "under", lambda self, name: right(self, "base"))
    with pytest.raises(RuntimeError, match="the first KL to the previous policy is"):
        reinforce(run, recipe, 2)
    assert not (run / "stages" / "02-again").exists()


def absolute(samples: list[Sample], run: Path) -> list[Sample]:
    folder = run / "data" / samples[0]["task"]
    return [{**sample, "images": [str(folder / image) for image in sample["images"]]} for sample in samples]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_rollouts_start_from_the_training_prompt(trained: tuple[Path, Path], images: int) -> None:
    """TRL's own tokenization of our rows against the collator's prompt."""
    from trl.data_utils import prepare_multimodal_messages

    samples = absolute(make_samples("colour", 3, images=images), trained[0])
    rows = [rft.prompt_dataset(samples)[i] for i in range(3)]
    prompts = [row["prompt"] for row in rows]
    if images:
        prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    trainer = GRPOTrainer.__new__(GRPOTrainer)  # only for its method; building one needs a model
    trainer.processing_class, trainer._is_vlm, trainer.tools = tiny_processor(), True, []
    trainer.environment_factories, trainer.chat_template, trainer.chat_template_kwargs = None, None, {}
    ids, _, fields = trainer._tokenize_prompts(prompts)
    for row, sample in zip(ids, samples, strict=True):
        batch = Collator(tiny_processor(), [], 1000).collate([sample])
        prompt = batch["input_ids"][0][batch["labels"][0] == -100]
        assert list(row) == prompt.tolist()
    assert ("pixel_values" in fields) == bool(images)


def test_a_template_without_a_system_role_is_refused_before_anything_is_drawn() -> None:
    def dropping(chat: Any, **_: Any) -> str:
        return "".join(part["text"] for turn in chat for part in turn["content"] if turn["role"] != "system")

    plain, told = make_samples("words", 2, images=0)
    told["prompt"] = [{"role": "system", "content": "Be brief."}, *told["prompt"]]
    processor = SimpleNamespace(chat_template="…", apply_chat_template=dropping)
    check_roles([plain], processor)
    with pytest.raises(InputError, match=r"sample words-1 of words: prompt: .* has no system role"):
        check_roles([plain, told], processor)


def test_mistakes_are_one_clear_line(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, recipe = copy_run(trained, tmp_path), trained[1]
    with pytest.raises(InputError, match=r"train.rft.args.beta: train.reference is `none` and beta is 0.1"):
        reinforce(run, recipe, 2, "train.reference=none")
    with pytest.raises(InputError, match="12 samples do not fill one generation batch of 32 prompts"):
        reinforce(run, recipe, 2, "train.global_batch_size=128")
    with pytest.raises(InputError, match=r"train.rft.args: generation_batch_size \(16\) must be divisible"):
        reinforce(run, recipe, 2, "train.rft.args.num_generations=3")
    with pytest.raises(InputError, match=r"train.rft.args.use_vllm: is set by the pipeline"):
        reinforce(run, recipe, 2, "train.rft.args.use_vllm=true")
    greedy = ("train.rft.args.temperature=0.001", "train.rft.args.max_steps=1")
    with pytest.raises(
        InputError, match=r"stage again: train.rft: all answers .* the same reward .* nothing was learn"
    ):
        reinforce(run, recipe, 2, *greedy)
    assert not (run / "stages" / "02-again").exists()


@pytest.fixture
def mixed(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A run whose fourth stage mixes 12 prompts with images and 12 without, and enters from the first."""
    run, recipe = copy_run(trained, tmp_path / "run"), tmp_path / "mixed.yaml"
    recipe.write_text(trained[1].read_text().replace("method:", "  - [again, words]\nmethod:"))
    (run / "stages" / "03-words").symlink_to(trained[0] / "stages" / "01-colour")
    return run, recipe


def test_images_and_text_in_one_stage(mixed: tuple[Path, Path]) -> None:
    batches: list[set[bool]] = []

    def make(entered: Any) -> Any:
        trainer = rft.make_trainer(entered)
        generate = trainer._generate_and_score_completions

        def watched(rows: list[dict[str, Any]]) -> Any:
            inputs = generate(rows)
            batches.append({bool(row["sample"]["images"]) for row in rows})
            assert ("pixel_values" in inputs) == (batches[-1] == {True})
            return inputs

        trainer._generate_and_score_completions = watched
        return trainer

    overrides = [*RFT, "train.rft.args.max_steps=6", "train.modules.vision=lora"]
    run_stage(load_recipe(mixed[1], overrides), 4, mixed[0], "rft", make)
    assert sorted(map(sorted, batches)) == [[False]] * 3 + [[True]] * 3  # an epoch: 12 and 12 prompts, 4 at a time
    log = read_jsonl(mixed[0] / "stages" / "04-again+words" / "train_log.jsonl")
    assert abs(log[0]["kl"]) < 1e-4 and len(log) == 7


@pytest.mark.slow
def test_images_and_text_in_one_stage_of_two_processes(mixed: tuple[Path, Path]) -> None:
    vision = "train.modules.vision=lora"  # a text batch leaves its factors without a gradient
    launch(mixed[0], mixed[1], "ddp", 2, *RFT, "train.rft.args.max_steps=6", vision, stage=4, script="rft")
    assert read_json(mixed[0] / "stages" / "04-again+words" / "trained.json")["mode"] == "ddp"
