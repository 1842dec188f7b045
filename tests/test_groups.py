"""The answers to a prompt in one row: the same log-probabilities and gradients, in groups that stay together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_packing import RECIPE, adapter
from torch import Tensor
from training import COLOURS, largest_gap, make_run, make_samples, write_images
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict

import mcit.pipeline.rft as rft
from mcit.data_prep.chat import open_image, render_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.reinforcement.groups import check_whole_groups, kept_together, packed_groups
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.packing import read_packed
from mcit.pipeline.training.replay import unwrapped

SIZE = 4  # answers to a prompt


def rollouts(folder: Path, processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What TRL's passes get: 4 answers each to 3 prompts, padded on both sides; and the labels."""
    questions = ("Which colour is it?", "What is shown, and where is it?", "Is it red?")
    texts, pictures = [], []
    for question, colour in zip(questions, COLOURS, strict=False):
        texts += [render_chat(processor, [{"role": "user", "content": question}], 1)] * SIZE
        pictures += [[open_image(folder / "images" / f"{colour}-0.png")]] * SIZE
    processor.tokenizer.padding_side = "left"
    fields = dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
    prompts = fields["input_ids"].shape
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(40, 90, (prompts[0], 7), generator=generator)
    answers[1] = answers[0]  # as happens
    told = (torch.arange(7) < torch.randint(1, 8, (prompts[0], 1), generator=generator)).long()
    for key in [key for key, value in fields.items() if value.shape == prompts]:
        fields[key] = torch.cat([fields[key], torch.zeros_like(answers)], 1)
    fields["input_ids"][:, prompts[1] :] = answers
    fields["attention_mask"][:, prompts[1] :] = told
    labels = fields["input_ids"].masked_fill(fields["attention_mask"] == 0, -100)
    labels[:, : prompts[1]] = -100
    return fields, labels


@pytest.mark.parametrize(
    "family",
    ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "llava", "internvl"))],
)
def test_log_probabilities_and_gradients_are_those_of_the_answers_by_themselves(family: str, tmp_path: Path) -> None:
    """The first token of an answer, which the shared prompt predicts, among them."""
    write_images(tmp_path)
    FAMILIES[family](tmp_path / family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.7)
    width, read = read_packed(model), []
    unwrapped(model).get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    fields, labels = rollouts(tmp_path, AutoProcessor.from_pretrained(tmp_path / family))
    weights = torch.randn(labels[:, 1:].shape, generator=torch.Generator().manual_seed(1))

    def passed(call: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        log_probs = call(**fields, labels=labels, fused_lm_head=True).log_probs
        (weights * log_probs).sum().backward()
        return log_probs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (apart, grads), (packed, others) = passed(model), passed(packed_groups(model, SIZE, width))
    assert (apart != 0).sum() == (labels != -100).sum()
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    assert others.keys() == grads.keys()
    least = 1e-7 * max(grad.norm() for grad in grads.values())  # keys' biases have no gradient but for rounding
    for name, grad in grads.items():
        assert (others[name] - grad).norm() <= 1e-5 * grad.norm() + least, name
    assert read[1] < 0.6 * read[0]


def test_groups_stay_together_and_randomness_is_what_it_was() -> None:
    batch = {"ids": torch.arange(24), "names": [str(i) for i in range(24)], "none": None, "total": torch.tensor(3)}
    torch.manual_seed(0)
    with kept_together(SIZE):
        shuffled = grpo_trainer.shuffle_sequence_dict(batch)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    shuffle_sequence_dict(batch)
    assert torch.equal(torch.get_rng_state(), state) and grpo_trainer.shuffle_sequence_dict is shuffle_sequence_dict
    assert shuffled["names"] == [str(i) for i in shuffled["ids"].tolist()]
    assert shuffled["none"] is None and shuffled["total"] == 3
    groups = shuffled["ids"].view(-1, SIZE)
    assert torch.equal(groups, groups[:, :1] + torch.arange(SIZE))
    assert sorted(groups[:, 0].tolist()) == [*range(0, 24, 4)] != groups[:, 0].tolist()


@pytest.mark.parametrize(
    ("per_device", "per_process", "fits"), [(8, 24, True), (2, 24, True), (3, 24, False), (8, 18, False)]
)
def test_groups_that_are_cut_up_are_refused(per_device: int, per_process: int, fits: bool) -> None:
    if fits:
        return check_whole_groups(per_device, per_process, SIZE)
    with pytest.raises(InputError, match=r"train.packing: .* not whole groups of 4"):
        check_whole_groups(per_device, per_process, SIZE)


WHOLE = ("train.rft.args.per_device_train_batch_size=4", "train.lineage=full", "train.modules.language=full")
RFT = """  paradigm: rft
  rft:
    rewards: {accuracy: 0, format: 0, "rewarding:spread": 1}
    args: {learning_rate: 0.1, lr_scheduler_type: constant, optim: sgd, max_steps: 3, num_generations: 4,
           max_completion_length: 6, beta: 0.1, logging_steps: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), WHOLE])
def test_a_stage_is_the_same_packed(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Three steps, in one micro-batch and in two; of a whole model, whose references are models of their own."""
    data = tmp_path / "data"
    recipe = make_run(data, {"colour": make_samples("colour", 12)}, RECIPE + RFT)
    for packing in ("true", "false"):
        run = tmp_path / packing
        (run / "stages").mkdir(parents=True)
        (run / "data").symlink_to(data / "data")
        (run / "stages" / "00-base").symlink_to(data / "stages" / "00-base")
        run_stage(load_recipe(recipe, [f"train.packing={packing}", *more]), 1, run, "rft", rft.make_trainer)
    packed, apart = (tmp_path / packing / "stages" / "01-colour" for packing in ("true", "false"))
    for key in ("loss", "grad_norm", "kl_base", "reward"):
        first, second = ([row[key] for row in read_jsonl(stage / "train_log.jsonl")[:-1]] for stage in (packed, apart))
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5), key
    if not more:
        assert largest_gap(adapter(packed), adapter(apart)) < 1e-5
