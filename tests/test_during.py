"""What is asked while a stage trains: scored as decoding would, on every process, and training does not notice."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_stage import copy_run, second_adapter, train
from training import (
    assert_same_curves,
    launch,
    make_run,
    make_samples,
    tiny_model,
    tiny_processor,
    uneven,
    write_images,
)
from transformers import GenerationConfig

from mcit.data_prep.files import read_json
from mcit.data_prep.schema import Sample
from mcit.eval.stability import read_curves
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.stage.during import choose_probes, due_steps, teacher_forced, undisturbed
from mcit.pipeline.training.collator import Collator

RECIPE = """
train:
  lora: {r: 4, alpha: 8, dropout: 0.3}
  global_batch_size: 8
  sft: {args: {learning_rate: 5e-3, lr_scheduler_type: constant, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
"""
DURING = "eval.during={dense: 2, growth: 1.5, probes: 5}"


def test_which_steps_are_due():
    assert list(islice(due_steps(50, 1.3), 62))[-12:] == [50, 52, 53, 56, 59, 62, 67, 73, 82, 92, 106, 124]
    assert list(islice(due_steps(0, 2), 6)) == [0, 2, 6, 14, 30, 62]
    assert list(islice(due_steps(3, 1), 8)) == [0, 1, 2, 3, 4, 5, 6, 7]
    for growth in (1.0, 1.05, 1.5, 3.7):
        steps = list(islice(due_steps(7, growth), 60))
        assert steps == sorted(set(steps))


def test_probes_are_the_same_whatever_stands_beside_them():
    samples = make_samples("t", 40)
    chosen = choose_probes(samples, 8)
    assert choose_probes(samples[::-1], 8) == chosen and len(chosen) == 8
    assert choose_probes([sample for sample in samples if sample in chosen], 99) == chosen
    assert [sample["id"] for sample in chosen] != sorted(sample["id"] for sample in chosen), "not just the first ones"


# --- Teacher forcing --------------------------------------------------------------------------------------------------


def questions(folder: Path) -> list[Sample]:
    write_images(folder)
    samples = [*make_samples("one", 6, images=1), *make_samples("two", 3, images=2, seed=1)]
    for i, sample in enumerate(samples):
        sample["images"] = [str(folder / image) for image in sample["images"]]
        sample["completion"][0]["content"] = " ".join(["red"] * (1 + i % 3))
    return samples


def greedy(model: Any, sample: Sample, room: int) -> list[int]:
    """The ids that the model itself generates for a sample's prompt."""
    collator = Collator(tiny_processor(), [], 2048)
    batch = collator.collate([sample])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    shape = batch.pop("labels").shape
    inputs = {key: value[:, :first] if value.shape == shape else value for key, value in batch.items()}
    return model.generate(**inputs, max_new_tokens=room, do_sample=False)[0, first:].tolist()


def test_teacher_forced_exact_match_is_greedy_exact_match(tmp_path):
    """Half of the answers are what the model says itself, half those with a token changed."""
    samples, model = questions(tmp_path), tiny_model().eval()
    tokenizer = tiny_processor().tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    batch = Collator(tiny_processor(), [], 2048, padding_side="left").collate(samples)
    labels = batch["labels"]
    for row, sample in enumerate(samples):
        places = (labels[row] != -100).nonzero()[:, 0]
        said = greedy(model, sample, len(places))
        assert len(said) == len(places)  # the random model does not come to an end
        if row % 2 == 0:
            said[row % len(said)] = (said[row % len(said)] + 1) % 100
        batch["input_ids"][row, places] = labels[row, places] = torch.tensor(said)
    with torch.no_grad():
        scores = teacher_forced(model, batch)
    assert scores[:, 0].tolist() == [float(row % 2) for row in range(len(samples))]


def test_log_probabilities_are_those_of_each_sample_alone(tmp_path):
    """Padding, other rows and the pictures of other rows are nothing to a row."""
    samples, model = questions(tmp_path), tiny_model().eval()
    alone = Collator(tiny_processor(), [], 2048)
    with torch.no_grad():
        found = teacher_forced(model, Collator(tiny_processor(), [], 2048, padding_side="left").collate(samples))
        for row, sample in enumerate(samples):
            batch = alone.collate([sample])
            labels = batch.pop("labels")[0]
            logprobs = model(**batch).logits[0].log_softmax(-1)
            gold = [(place, int(label)) for place, label in enumerate(labels) if label != -100]
            expected = sum(logprobs[place - 1, token].item() for place, token in gold)
            assert found[row, 1].item() == pytest.approx(expected, abs=1e-3)
            assert found[row, 2].item() == len(gold)


def test_the_model_and_the_random_numbers_are_as_they_were():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[2].eval()
    torch.manual_seed(3)
    with undisturbed(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(5)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert [module.training for module in model] == [True, True, False] and torch.is_grad_enabled()


# --- Whole stages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose first stage is trained, asked meanwhile."""
    run = tmp_path_factory.mktemp("run")
    recipe = make_run(run, {"colour": make_samples("colour", 20), "words": uneven("words", 19, 0)}, RECIPE)
    train(run, recipe, 1, DURING)
    return run, recipe


@pytest.fixture(scope="module")
def asked(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    """The same run with its second stage, in one process, and the model as training left it."""
    run = copy_run(trained, tmp_path_factory.mktemp("asked"))
    return run, train(run, trained[1], 2, DURING)


def curves_of(run: Path) -> Any:
    curves = read_curves(run / "stages" / "02-words")
    assert curves is not None
    return curves


def test_training_is_the_same_to_the_bit(trained, asked, tmp_path):
    """With dropout, whose random numbers an evaluation in between must not touch."""
    run = copy_run(trained, tmp_path)
    train(run, trained[1], 2)
    plain, watched = second_adapter(run), second_adapter(asked[0])
    assert plain.keys() == watched.keys() and all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not (run / "stages" / "02-words" / "during.json").exists()
    assert "during" not in read_json(run / "stages" / "02-words" / "trained.json")


def test_what_a_stage_leaves(asked):
    run, _ = asked
    curves, trained = curves_of(run), read_json(run / "stages" / "02-words" / "trained.json")
    assert curves["schedule"] == {"dense": 2, "growth": 1.5, "probes": 5}
    assert curves["data"] == {"colour": "0", "words": "0"}
    assert curves["steps"] == [0, 1, 2, 4, 6] and trained["steps"] == 6  # 19 samples fill three batches of 8, twice
    assert list(curves["tasks"]) == ["colour", "words"]
    for scores in curves["tasks"].values():
        assert {len(column) for column in scores.values()} == {5}
        assert all(0 <= value <= 100 for value in scores["exact"]) and all(value < 0 for value in scores["logprob"])
    assert len(set(curves["tasks"]["words"]["logprob"])) == 5, "training moves the task it trains"
    assert trained["during"]["evaluations"] == 5 and trained["during"]["probes"] == 4  # two test samples a task
    assert trained["during"]["seconds"] > 0


def test_a_stage_begins_and_ends_with_the_policies_that_are_served(asked, trained):
    """The first point is that of the adapter before, the last that of the adapter it leaves."""
    run, recipe = asked[0], load_recipe(trained[1])
    curves = curves_of(run)
    first = read_curves(trained[0] / "stages" / "01-colour")
    assert first is not None and first["tasks"].keys() == {"colour"}
    assert first["tasks"]["colour"]["logprob"][-1] == pytest.approx(curves["tasks"]["colour"]["logprob"][0], abs=1e-5)
    samples = make_samples("colour", 20)[:2]  # the test part
    for sample in samples:
        sample["images"] = [str(trained[0] / "data" / "colour" / image) for image in sample["images"]]
    policy = PeftModel.from_pretrained(tiny_model(), run / "stages" / "02-words" / "adapter").eval()
    with torch.no_grad():
        scores = teacher_forced(policy, Collator(tiny_processor(), [], 2048, padding_side="left").collate(samples))
    _, logprobs, tokens = scores.sum(0).tolist()
    assert curves["tasks"]["colour"]["logprob"][-1] == pytest.approx(logprobs / tokens, abs=1e-4)
    assert recipe.eval.during is None, "off unless a recipe asks for it"


@pytest.mark.slow
def test_two_processes_under_ddp_share_the_work_and_train_the_same_to_the_bit(trained, tmp_path):
    """As test_stage has it for ZeRO-2. Without dropout, so that one process and two train alike."""
    alone, together, unasked = (copy_run(trained, tmp_path / name) for name in ("alone", "together", "unasked"))
    train(alone, trained[1], 2, DURING, "train.lora.dropout=0.0")
    launch(together, trained[1], "ddp", 2, DURING, "train.lora.dropout=0.0")
    launch(unasked, trained[1], "ddp", 2, "train.lora.dropout=0.0")
    assert_same_curves(alone, together)
    watched, plain = second_adapter(together), second_adapter(unasked)
    assert all(torch.equal(plain[name], watched[name]) for name in watched)
