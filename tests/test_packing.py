"""Packed rows are what they are by themselves: to a model of each family, and to what a stage leaves."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from safetensors.torch import load_file
from torch import Tensor
from training import TINY, largest_gap, launch, make_run, make_samples, tiny_model, uneven, write_images
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer import utils

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.data_prep.schema import Sample
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.sft import make_trainer
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.arguments import check_stage
from mcit.pipeline.training.batches import GlobalBatchSampler, same_images
from mcit.pipeline.training.collator import IGNORED, Collator
from mcit.pipeline.training.head import labels_alone
from mcit.pipeline.training.packing import NONE, PACKING, Packing, pack, read_packed
from mcit.pipeline.training.replay import unwrapped

ENDLESS = 10**9  # a hidden size beside which the length of a row costs nothing
QUESTIONS = ("Which colour is it?", "What is this, and where?", "Is it red?", "Which colour is it?", "Count them.")


def by_hand(rows: Sequence[Sequence[int]], alike: Sequence[int], width: int = ENDLESS) -> Packing:
    """Rows of tokens, 0 being padding, packed."""
    ids = torch.tensor(rows)
    return pack(ids, (ids != 0).long(), alike, width)


def seen(packing: Packing) -> Tensor:
    """[packed, size, size]: whether a token, by row and place, sees another."""
    rows, size = packing.picked.shape
    row, query, key = torch.meshgrid(torch.arange(rows), torch.arange(size), torch.arange(size), indexing="ij")
    return packing.sees(row, row, query, key)


def test_rows_that_begin_alike_are_one_tree() -> None:
    packing = by_hand([[7, 7, 7, 1, 2, 0], [7, 7, 7, 3, 0, 0], [7, 7, 7, 1, 4, 5]], alike=[0, 0, 0])
    assert packing.picked.tolist() == [[0, 1, 2, 3, 4, 9, 15, 16, 17]]  # counted through rows of 6
    assert packing.branch.tolist() == [[NONE] * 3 + [0, 0, 1, 2, 2, 2]]
    assert packing.places[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert packing.places[1, :4].tolist() == [0, 1, 2, 5]
    assert packing.places[2].tolist() == [0, 1, 2, 6, 7, 8]
    assert seen(packing)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 1],
    ]


def test_pictures_that_differ_are_never_shared_and_rows_are_filled() -> None:
    """Equal tokens of other pictures; two short rows fit beside each other, as long as the longest."""
    packing = by_hand([[7, 7, 1, 2, 3, 4], [7, 7, 1, 0, 0, 0], [7, 7, 1, 0, 0, 0]], alike=[0, 1, 2])
    assert packing.picked.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 12, 13, 14]]
    assert seen(packing)[1].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def test_every_token_sees_what_it_saw_and_nothing_else() -> None:
    """Against brute force, on random rows with padding on both sides, in whatever way they are packed."""
    generator = torch.Generator().manual_seed(0)
    for width in (1, 8, ENDLESS):
        for _ in range(20):
            heads = torch.randint(1, 9, (3, 4), generator=generator)
            alike = torch.randint(3, (7,), generator=generator)
            ids = torch.cat([heads[alike], torch.randint(1, 3, (7, 9), generator=generator)], 1)
            ids[:, :2] = ids[:, :2] * (alike != 0)[:, None]  # one kind of row is padded on the left
            lengths = torch.randint(1, 10, (7,), generator=generator)
            mask = (ids != 0) & (torch.arange(13) < 4 + lengths[:, None])
            packing = pack(ids, mask.long(), alike.tolist(), width)
            at = packing.places[mask]  # of all tokens, row by row
            row, column = mask.nonzero().T
            wanted = (row[:, None] == row) & (column[:, None] >= column)
            sees = torch.block_diag(*seen(packing).long())[at]
            assert torch.equal(sees > 0, wanted.long() @ F.one_hot(at, packing.picked.numel()) > 0)
            assert torch.equal(ids.flatten()[packing.picked.flatten()[at]], ids[mask])


def test_a_tree_is_not_larger_than_pays() -> None:
    """Long answers to a short question: attention over all of them would cost more than the question is worth."""
    rows = [[7, 7] + [n] * 60 for n in range(1, 9)]
    assert by_hand(rows, [0] * 8).picked.shape == (1, 2 + 8 * 60)
    assert by_hand(rows, [0] * 8, width=1).picked.shape == (8, 62)


def shown(folder: Path, answers: Sequence[str] = ("red", "in the middle", "yes", "green", "one")) -> list[Sample]:
    """Five questions on a picture, two on another one of the same size, one on a larger one."""
    samples = make_samples("colour", 8)
    pictures = ["red-0"] * 5 + ["blue-0"] * 2 + ["green-1"]
    for i, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
        sample["images"] = [str(folder / "images" / f"{picture}.png")]
        sample["prompt"] = [{"role": "user", "content": QUESTIONS[i % 5]}]
        sample["completion"] = [{"role": "assistant", "content": answers[i % 5]}]
    return samples


def passed(model: Any, batch: dict[str, Any], **more: Any) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, logits of all tokens, and gradients of whatever has one."""
    model.zero_grad()
    output = model(**batch, **more, use_cache=False)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), output.logits.detach()[batch["attention_mask"].bool()], grads


@pytest.mark.parametrize(
    "family",
    ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "llava", "internvl"))],
)
def test_loss_and_gradients_are_those_of_the_rows_by_themselves(family: str, tmp_path: Path) -> None:
    """In float32; of all weights, tower and embeddings among them; each picture goes through the tower once."""
    write_images(tmp_path)
    FAMILIES[family](tmp_path / family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype=torch.float32)
    samples, tower = shown(tmp_path), []
    batch = Collator(AutoProcessor.from_pretrained(tmp_path / family), [], 1000).collate(samples)
    loss, logits, grads = passed(model, batch)
    read_packed(model)
    assert passed(model, batch)[0] == pytest.approx(loss, rel=1e-6)  # without a packing, nothing is different
    model.get_encoder("image").register_forward_hook(
        lambda _, args, kwargs, __: tower.append(pixels(args, kwargs)), with_kwargs=True
    )
    packing = pack(batch["input_ids"], batch["attention_mask"], same_images(samples), ENDLESS)
    assert packing.picked.numel() < 0.8 * batch["input_ids"].numel()
    packed = passed(model, batch, **{PACKING: packing})
    assert packed[0] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(packed[1], logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    assert packed[2].keys() == grads.keys()
    least = 1e-7 * max(grad.norm() for grad in grads.values())  # keys' biases have no gradient but for rounding
    for name, grad in grads.items():
        assert (packed[2][name] - grad).norm() <= 1e-5 * grad.norm() + least, name
    if family != "internvl":  # whose larger picture is two tiles
        distinct = Collator(AutoProcessor.from_pretrained(tmp_path / family), [], 1000).collate(
            [samples[i] for i in (0, 5, 7)]
        )
        assert tower == [len(distinct["pixel_values"])]


def pixels(args: Any, kwargs: Any) -> int:
    return len(args[0] if args else kwargs["pixel_values"])


def test_tokens_without_a_label_are_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU TRL scores all; what comes of the others is the same either way."""
    write_images(tmp_path)
    model, scored = tiny_model(), []
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batch = Collator(AutoProcessor.from_pretrained(TINY), [], 1000).collate(shown(tmp_path))
    apply = utils._ChunkedLogProbFunction.apply

    def count(hidden: Tensor, *args: Any) -> Any:
        scored.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", count)
    everything = model(**batch, fused_lm_head=True)
    with labels_alone():
        alone = model(**batch, fused_lm_head=True)
    model(**batch, fused_lm_head=True)
    rows, length = batch["labels"].shape
    assert scored == [rows * (length - 1), int((batch["labels"] != IGNORED).sum()), rows * (length - 1)]
    torch.testing.assert_close(alone.log_probs, everything.log_probs)
    torch.testing.assert_close(alone.entropy, everything.entropy)


RECIPE = """
train:
  packing: true
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  sft: {order: by_image, args: {learning_rate: 0.1, lr_scheduler_type: constant, optim: sgd, logging_steps: 1,
        num_train_epochs: 2, gradient_checkpointing: false}}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve questions on four pictures, eight without any."""
    run = tmp_path_factory.mktemp("prepared")
    return run, make_run(run, {"colour": uneven("colour", 12, 1), "words": uneven("words", 8, 0)}, RECIPE)


def train(prepared: tuple[Path, Path], run: Path, *overrides: str, watch: Any = lambda trainer: None) -> Path:
    """Stage 1; its folder."""
    run.mkdir()
    (run / "data").symlink_to(prepared[0] / "data")
    (run / "stages").mkdir()
    (run / "stages" / "00-base").symlink_to(prepared[0] / "stages" / "00-base")

    def make(entered: Any) -> Any:
        trainer = make_trainer(entered)
        watch(trainer)
        return trainer

    run_stage(load_recipe(prepared[1], overrides), 1, run, "sft", make)
    return run / "stages" / "01-colour"


def adapter(stage: Path) -> dict[str, Tensor]:
    return load_file(stage / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    for key in ("loss", "grad_norm", "num_tokens"):
        first, second = ([row[key] for row in read_jsonl(stage / "train_log.jsonl")[:-1]] for stage in (one, other))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), key
    assert largest_gap(adapter(one), adapter(other)) < 1e-5


def test_a_stage_is_the_same_packed_and_reads_fewer_tokens(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    read: dict[str, int] = {}

    def train_one(name: str, *overrides: str) -> Path:
        def watch(trainer: Any) -> None:
            def count(module: Any, args: Any, kwargs: Any) -> None:
                read[name] = read.get(name, 0) + kwargs["inputs_embeds"].shape[:2].numel() * module.training

            unwrapped(trainer.model).get_decoder().register_forward_pre_hook(count, with_kwargs=True)

        return train(prepared, tmp_path / name, *overrides, watch=watch)

    apart = train_one("apart", "train.packing=false")
    packed = train_one("packed")
    assert_same(apart, packed)
    assert read["packed"] < 0.6 * read["apart"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["sft.args.per_device_train_batch_size=2", "sft.args.gradient_checkpointing=true", "sft.order=shuffled"]
)
def test_a_stage_is_the_same_packed_in_any_way(prepared: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    apart = train(prepared, tmp_path / "apart", f"train.{how}", "train.packing=false")
    assert_same(apart, train(prepared, tmp_path / "packed", f"train.{how}"))


@pytest.mark.slow
def test_two_processes_pack_as_one(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    alone = train(prepared, tmp_path / "alone", "train.packing=false")
    together = tmp_path / "together"
    (together / "stages").mkdir(parents=True)
    (together / "data").symlink_to(prepared[0] / "data")
    (together / "stages" / "00-base").symlink_to(prepared[0] / "stages" / "00-base")
    launch(together, prepared[1], "ddp", 2, stage=1)
    assert_same(alone, together / "stages" / "01-colour")


@pytest.mark.parametrize("epoch", [0, 1])
def test_samples_on_a_picture_follow_each_other(epoch: int) -> None:
    alike = [i // 5 for i in range(40)] + list(range(40, 43))
    sampler = GlobalBatchSampler([True] * 43, 8, 4, 1, seed=1, alike=alike)
    sampler.set_epoch(epoch)
    order = [i for step in sampler for i in step.samples]
    assert sorted(order[:43]) == list(range(43)) and order[43:] == order[:5]
    pictures = [alike[i] for i in order[:43]]
    changes = 1 + sum(one != two for one, two in pairwise(pictures))
    assert changes == len(set(alike)) and pictures != sorted(pictures)
    assert any(order[i : i + 5] != sorted(order[i : i + 5]) for i in range(0, 43, 5))


def test_a_model_whose_rows_are_something_else_packed_is_refused(
    prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would be whose attention has a mask of its own."""
    monkeypatch.setattr(Packing, "sees", lambda self, row, head, query, key: (row == row) & (key <= query))
    with pytest.raises(InputError, match=r"train.packing: does not work for Qwen2_5_VL.*rows know of each other"):
        train(prepared, tmp_path / "run")


def test_mistakes_are_one_clear_line(prepared: tuple[Path, Path]) -> None:
    model = tiny_model()
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError, match=r"train.packing: does not work with attention by flash_attention_2.*Use sdpa"):
        read_packed(model)
    with pytest.raises(InputError, match=r"train.packing: l2p looks at each sample's row as a whole"):
        load_recipe(prepared[1], ["method={l2p: {}}", "train.lineage=continue"])
    with pytest.raises(InputError, match=r"packing: is set by the pipeline.*Set train.packing"):
        check_stage(load_recipe(prepared[1], ["train.sft.args.packing=true"]).stages[0])
