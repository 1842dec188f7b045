"""Which samples train together: checked against what is wanted, written out, and in stages that mix images and text."""

import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import MeanLength, launch, make_run, uneven
from trl.trainer.utils import RepeatSampler

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
import mcit.pipeline.training.replay as replay
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.lengths import lengths_of, write_lengths
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.batches import (
    Drawn,
    GlobalBatchSampler,
    GroupSampler,
    MicroBatch,
    by_length,
    deal,
    micro_steps,
)

SPLITS = [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]  # processes, per device; 8 a global batch


def mixture(images: int, text: int) -> list[bool]:
    kinds = [True] * images + [False] * text
    random.Random(images).shuffle(kinds)
    return kinds


def by_step(sampler: GlobalBatchSampler) -> list[list[list[MicroBatch]]]:
    """An epoch as [global batch][micro-step][process]."""
    dealt = list(sampler)
    assert len(dealt) == len(sampler)
    size = sampler.processes
    steps = [dealt[i : i + size] for i in range(0, len(dealt), size)]
    return [steps[i : i + sampler.micro_steps] for i in range(0, len(steps), sampler.micro_steps)]


def plain(size: int, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of 8 as they are without any rule on images."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
    order += (order * 8)[: -size % 8]
    return [order[i : i + 8] for i in range(0, len(order), 8)]


@pytest.mark.parametrize(("processes", "per_device"), SPLITS)
@pytest.mark.parametrize("kinds", [(20, 0), (0, 19), (11, 8), (1, 30), (30, 1), (3, 2), (16, 16)])
def test_every_split_deals_the_same_global_batches_kind_by_kind(
    kinds: tuple[int, int], processes: int, per_device: int
) -> None:
    has_images = mixture(*kinds)
    sampler = GlobalBatchSampler(has_images, 8, per_device, processes, seed=3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = by_step(sampler)
        wanted = plain(len(has_images), 3, epoch)
        assert len(batches) == len(wanted)
        for steps, batch in zip(batches, wanted, strict=True):
            size = processes * per_device
            assert len(steps) == 8 // size + (all(kinds) and size > 1)
            learned = [i for step in steps for share in step if share.loss for i in share.samples]
            assert Counter(learned) == Counter(batch)
            for step in steps:
                assert len({has_images[i] for share in step for i in share.samples}) == 1
                for share in step:
                    assert 1 <= len(share.samples) <= per_device and (share.loss or len(share.samples) == 1)
        seen = Counter(i for batch in wanted for i in batch)
        assert set(seen) == set(range(len(has_images))) and sum(seen.values()) == -(-len(has_images) // 8) * 8


def test_one_kind_is_dealt_as_it_comes() -> None:
    """No filling, no re-ordering: the plain permutation, per device and in turn."""
    dealt = list(GlobalBatchSampler([True] * 16, 8, per_device=2, processes=2, seed=0))
    assert [i for share in dealt for i in share.samples] == [i for batch in plain(16, 0, 0) for i in batch]
    assert all(share.loss and len(share.samples) == 2 for share in dealt)


@pytest.mark.parametrize(("processes", "per_device"), SPLITS)
@pytest.mark.parametrize("kinds", [(40, 0), (0, 19), (21, 18)])
def test_a_global_batch_is_dealt_from_long_to_short(kinds: tuple[int, int], processes: int, per_device: int) -> None:
    """The same global batches, less padding, and what is drawn beside still last in its micro-batch."""
    own, rng = sum(kinds), random.Random(0)
    has_images = [*mixture(*kinds), True, False, True]
    lengths = [rng.randrange(10, 100) for _ in has_images]
    drawn = [Drawn(range(own, own + 3), 2)]
    before, dealt = (
        by_step(GlobalBatchSampler(has_images, 8, per_device, processes, 3, drawn, lengths=known))
        for known in (None, lengths)
    )
    places = [0, 0]
    for batches in zip(before, dealt, strict=True):
        learned = [
            Counter(i for step in batch for share in step if share.loss for i in share.samples) for batch in batches
        ]
        assert learned[0] == learned[1]
        for which, batch in enumerate(batches):
            places[which] += sum(
                len(share.samples) * max(lengths[i] for i in share.samples) for step in batch for share in step
            )
        for kind in (True, False):
            steps = [step for step in batches[1] if has_images[step[0].samples[0]] == kind]
            spans = [[lengths[i] for share in step if share.loss for i in share.samples] for step in steps]
            assert all(min(one) >= max(other) for one, other in pairwise(filter(None, spans)))
        for share in (share for step in batches[1] for share in step):
            assert [i >= own for i in share.samples] == sorted(i >= own for i in share.samples)
    assert places[1] <= places[0] and (per_device in (1, 8) or places[1] < 0.95 * places[0])


def test_what_was_not_counted_is_dealt_as_it_comes(tmp_path: Path) -> None:
    samples = uneven("words", 3, 0)
    assert lengths_of(tmp_path, samples) is None  # a run of an earlier version
    (tmp_path / "data").mkdir()
    write_lengths(tmp_path, {"words": {sample["id"]: 7 + i for i, sample in enumerate(samples)}})
    assert lengths_of(tmp_path, samples) == [7, 8, 9]
    assert lengths_of(tmp_path, [*samples, {**samples[0], "id": "made up"}]) is None  # a sample of a method's own


def test_trees_stay_together_and_no_process_always_has_the_longest() -> None:
    lengths, trees = [9, 5, 8, 1, 7, 2, 6, 3], list("abcdadcb")
    assert by_length(range(8), lengths, trees) == [0, 4, 2, 6, 1, 7, 3, 5]
    [steps] = by_step(GlobalBatchSampler([True] * 8, 8, 2, 2, 0, lengths=lengths, trees=trees))
    assert [{*share.samples} for step in steps for share in step] == [{0, 4}, {2, 6}, {3, 5}, {1, 7}]


def test_an_epoch_has_its_own_order_and_a_seed_decides_it() -> None:
    has_images = mixture(11, 8)

    def dealt(seed: int, epoch: int) -> list[MicroBatch]:
        sampler = GlobalBatchSampler(has_images, 8, 2, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert dealt(0, 1) == dealt(0, 1) != dealt(0, 0) != dealt(1, 0)


@pytest.mark.parametrize(("processes", "per_device"), SPLITS)
@pytest.mark.parametrize("kinds", [(20, 0), (0, 19), (11, 8)])
def test_what_is_drawn_beside_comes_on_top_and_last(kinds: tuple[int, int], processes: int, per_device: int) -> None:
    """The stage's own global batches are what they are without; every split deals the same samples beside them."""
    own = sum(kinds)
    drawn = [Drawn(range(own, own + 7), 3), Drawn(range(own + 7, own + 9), 1)]
    has_images = mixture(*kinds) + mixture(4, 3) + [False, False]
    sampler = GlobalBatchSampler(has_images, 8, per_device, processes, 3, drawn)
    beside = Counter[int]()
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for number, (steps, batch) in enumerate(zip(by_step(sampler), plain(own, 3, epoch), strict=True), 3 * epoch):
            wanted = [*batch, *drawn[0].of(number, 3), *drawn[1].of(number, 3)]
            assert Counter(i for step in steps for share in step if share.loss for i in share.samples) == Counter(
                wanted
            )
            for step in steps:
                assert len({has_images[i] for share in step for i in share.samples}) == 1
                for share in step:
                    assert 1 <= len(share.samples) <= per_device
                    assert [i >= own for i in share.samples] == sorted(i >= own for i in share.samples)
            beside.update(wanted[8:])
    assert [beside[i] for i in drawn[0].indices] == pytest.approx([18 / 7] * 7, abs=1)
    assert [beside[i] for i in drawn[1].indices] == [3, 3]


def test_what_is_drawn_goes_round_and_round() -> None:
    drawn = Drawn(range(10, 15), 4)
    row = [i for number in range(10) for i in drawn.of(number, seed=1)]
    turns = [row[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(turn) == [10, 11, 12, 13, 14] for turn in turns) and len({*map(tuple, turns)}) > 4
    assert drawn.of(3, seed=2) != drawn.of(3, seed=1) == row[12:16]
    assert sorted(Drawn(range(2), 4).of(0, seed=0)) == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20])
def test_micro_steps_are_as_many_as_the_worst_batch_needs(size: int) -> None:
    both, images, text = [True, False], [True], [False]
    for parts in ([(8, both)], [(8, images)], [(8, images), (3, text)], [(8, both), (2, images), (1, text)]):
        choices = [[False] * count if kinds == text else [True] * count for count, kinds in parts]
        worst = 0
        for free in range(9 if both in (kinds for _, kinds in parts) else 1):
            has = [one for choice in choices for one in choice]
            has[:free] = [False] * free
            worst = max(worst, len(list(deal(range(len(has)), has, size, 1))))
        assert micro_steps(parts, size) == worst


@pytest.mark.parametrize("kinds", [(12, 0), (13, 6), (4, 21)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_generation_batches_are_of_one_kind_and_no_prompt_is_left_out(kinds: tuple[int, int], repeats: int) -> None:
    has_images, prompts, group = mixture(*kinds), 4, 2
    sampler = GroupSampler(has_images, prompts, group, repeats, seed=1)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    size = prompts * group
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    for first in range(0, len(batches), repeats):
        assert all(batch == batches[first] for batch in batches[first : first + repeats])
    seen = Counter[int]()
    for batch in batches[::repeats]:
        assert all(batch[i] == batch[i + 1] for i in range(0, size, group))
        assert len({has_images[i] for i in batch}) == 1
        seen.update(batch[::group])
    for kind, number in zip((True, False), kinds, strict=True):
        times = [seen[i] for i, has in enumerate(has_images) if has == kind]
        assert sum(times) == -(-number // prompts) * prompts and (not times or 1 <= min(times) <= max(times) <= 2)
    order = [has_images[batch[0]] for batch in batches[::repeats]]
    assert not all(kinds) or order != sorted(order, reverse=True)  # the kinds take turns
    sampler.set_epoch(1)
    assert list(sampler) != rows


def test_generation_batches_have_the_layout_that_trl_expects() -> None:
    """TRL's own sampler on the order that ours takes: every row is where it would be."""
    ours = list(GroupSampler([True] * 8, prompts=4, group=3, repeats=2, seed=0))
    order = [ours[i] for i in range(0, 12, 3)] + [ours[i] for i in range(24, 36, 3)]
    theirs = RepeatSampler(order, mini_repeat_count=3, batch_size=4, repeat_count=2, shuffle=False)
    assert [order[i] for i in theirs] == ours


RECIPE = """
  - [colour, words]
method: {"training:MeanLength": {}}
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  modules: {vision: lora, projector: lora}
  sft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
  rft: {args: {beta: 0.1, num_generations: 4}}
"""
MIXED = "03-colour+words"
KINDS = [True] * 17 + [False] * 4
ODD = ("train.sft.args.per_device_train_batch_size=2",)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose third stage mixes 17 samples with images and 4 without; it enters from the base."""
    run = tmp_path_factory.mktemp("mixed")
    recipe = make_run(run, {"colour": uneven("colour", 17, 1), "words": uneven("words", 4, 0)}, RECIPE)
    return run, recipe


def copy_run(mixed: tuple[Path, Path], to: Path) -> Path:
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(mixed[0] / "data")
    for name in ("00-base", "02-words"):
        (to / "stages" / name).symlink_to(mixed[0] / "stages" / "00-base")
    return to


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / MIXED / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, two: Path) -> None:
    ours, theirs = trained(one), trained(two)
    assert ours.keys() == theirs.keys() and any("visual" in name for name in ours)
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-5
    logs = [read_jsonl(run / "stages" / MIXED / "train_log.jsonl")[:-1] for run in (one, two)]
    assert len(logs[0]) == 6
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in logs[0]] == pytest.approx([row[key] for row in logs[1]], rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def whole(mixed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage trained without the rule: each global batch one forward pass, images and text together."""
    run = copy_run(mixed, tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "with_images", lambda samples: [True] * len(samples))
        run_stage(load_recipe(mixed[1]), 3, run, "sft", sft.make_trainer)
    return run


@pytest.mark.parametrize("per_device", [8, 2, 1])
def test_a_mixed_stage_learns_what_it_would_in_mixed_batches(
    mixed: tuple[Path, Path], whole: Path, tmp_path: Path, per_device: int
) -> None:
    """Kind by kind, in any accumulation split: the same losses, the same terms of methods, the same weights."""
    run = copy_run(mixed, tmp_path / "run")
    seen: list[set[bool]] = []

    def make(entered: Any) -> Any:
        trainer = sft.make_trainer(entered)
        collate = trainer.data_collator

        def watched(one: list[MicroBatch]) -> Any:
            seen.append({KINDS[i] for share in one for i in share.samples})
            return collate(one)

        trainer.data_collator = watched
        return trainer

    override = f"train.sft.args.per_device_train_batch_size={per_device}"
    run_stage(load_recipe(mixed[1], [override]), 3, run, "sft", make)
    assert {len(kinds) for kinds in seen} == {1} and {True} in seen and {False} in seen
    assert len(seen) == 6 * (8 // per_device + (per_device > 1))
    assert_same(whole, run)
    terms = [read_jsonl(at / "stages" / MIXED / "train_log.jsonl")[:-1] for at in (whole, run)]
    key = f"{MeanLength.name}_loss"
    assert [row[key] for row in terms[0]] == pytest.approx([row[key] for row in terms[1]]) and terms[0][0][key] > 1


@pytest.mark.parametrize("mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("zero2", "zero3"))])
def test_two_processes_on_a_mixed_stage_are_one(
    mixed: tuple[Path, Path], whole: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vision tower and projector train; a lone sample leaves the other process a micro-batch without loss."""
    dealt = GlobalBatchSampler(KINDS, 8, 2, 2, seed=3)
    assert not all(share.loss for share in dealt)
    run = copy_run(mixed, tmp_path / "run")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")  # of the method
    launch(run, mixed[1], mode, 2, *ODD, stage=3)
    summary = read_json(run / "stages" / MIXED / "trained.json")
    assert (summary["processes"], summary["mode"]) == (2, mode)
    assert_same(whole, run)


def test_a_kind_too_small_for_a_generation_batch_is_refused(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_run(mixed, tmp_path / "run")
    overrides = ["train.paradigm=rft", "train.global_batch_size=32"]
    with pytest.raises(InputError, match="4 samples without images do not fill one generation batch of 8 prompts"):
        run_stage(load_recipe(mixed[1], overrides), 3, run, "rft", rft.make_trainer)
