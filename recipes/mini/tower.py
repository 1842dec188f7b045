"""Pretrain the vision tower, as a real VLM's tower and projector are: a few minutes, from dense labels for every token.

Without it, so small a model spends most of its pretraining finding out that the picture matters. Most labels are words,
and a token is scored against the language model's own embeddings of them: so the projector speaks the language of the
words, and a head that looks for an earlier ` red` finds red in a picture too. What has no word, the edges of boxes and
the exact row and column, is read by linear heads that are thrown away. So is, for letters, what is drawn at the token's
own place: to name a letter its strokes could be forgotten, and other glyphs are to be told apart later.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, get_cosine_schedule_with_warmup

from mcit.data_prep.mini import world

GRID, CELL = 4, world.SIZE // 4  # tokens a side, pixels a token
NOTHING = -100  # the label that carries no loss
SCENES = CHARTS = 20  # in a batch
LETTERS = 40
# Label 0: none of the words.
WORDS: dict[str, Sequence[str]] = {
    "colour": tuple(world.COLOURS),
    "shape": (*world.SHAPES, "bar"),
    "height": ("top", "bottom"),
    "side": ("left", "right"),
    "place": world.ORDINALS,
    "letter": tuple(world.LETTERS),  # every token of a letter says which it is
}
HEADS = {"row": GRID, "column": GRID}
HEADS |= dict.fromkeys(("x1", "y1", "x2", "y2"), world.SIZE // 2 + 1)  # boxes lie on a 2-pixel grid
INK = 8  # a token's own pixels are read as this many by as many means
Labels = dict[str, Tensor]


def train_tower(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, rng: np.random.Generator, steps: int
) -> None:
    """Train tower and projector for `steps` batches of 80 fresh pictures; prints each label's accuracy."""
    visual, device = model.model.visual, model.device
    width = model.config.vision_config.out_hidden_size
    vectors = {name: _word_vectors(model, processor, words) for name, words in WORDS.items()}
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in HEADS.items()}).to(device)
    strokes = nn.Linear(width, INK * INK).to(device)
    parameters = [*visual.parameters(), *heads.parameters(), *strokes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule, start = get_cosine_schedule_with_warmup(optimizer, 100, steps), time.monotonic()
    for step in range(1, steps + 1):
        pictures, labels = _batch(rng)
        labels = {name: label.to(device) for name, label in labels.items()}
        inputs = processor.image_processor(images=pictures, return_tensors="pt").to(device)
        tokens = visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        tokens = tokens.view(len(pictures), GRID * GRID, width)
        scores = {name: tokens @ vectors[name].T for name in WORDS}  # 1 for a word itself
        wrong = [(scores[name] - F.one_hot(labels[name], 1 + len(WORDS[name]))[..., 1:]).square() for name in WORDS]
        loss = 10 * torch.cat(wrong, -1).sum(-1).mean() + 0.02 * tokens.square().mean()
        logits = {name: F.pad(10 * score, (1, 0), value=5.0) for name, score in scores.items()}
        logits |= {name: head(tokens) for name, head in heads.items()}
        loss += sum(F.cross_entropy(logits[name].flatten(0, 1), labels[name].flatten()) for name in logits)
        loss += 30 * F.mse_loss(strokes(tokens[-LETTERS:]), _ink(pictures[-LETTERS:]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = {n: (logits[n].argmax(-1) == labels[n])[labels[n] != NOTHING].float().mean() for n in logits}
            shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in right.items())
            print(f"tower {step}  {time.monotonic() - start:.0f} s  {shares}", flush=True)


def _word_vectors(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, words: Sequence[str]
) -> Tensor:
    """The embeddings of ` word`, each one token, over their squared length: [words, width]."""
    ids = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(token) == 1 for token in ids), f"not every word is one token: {words}"
    vectors = model.get_input_embeddings().weight.detach()[[token[0] for token in ids]]
    return vectors / vectors.square().sum(1, keepdim=True)


def _batch(rng: np.random.Generator) -> tuple[list[Image.Image], Labels]:
    """20 scenes, 20 charts, 40 letters; labels by name, each [80, 16]."""
    pictures = []
    labels = {name: torch.zeros((SCENES + CHARTS + LETTERS, GRID, GRID), dtype=torch.long) for name in WORDS}
    labels |= {name: torch.full((SCENES + CHARTS + LETTERS, GRID, GRID), NOTHING) for name in HEADS}
    labels["row"][:] = torch.arange(GRID)[:, None]
    labels["column"][:] = torch.arange(GRID)
    labels["height"][:] = 1 + labels["row"] // 2
    labels["side"][:] = 1 + labels["column"] // 2
    for n in range(SCENES):
        scene = world.make_scene(rng)
        pictures.append(world.draw_scene(rng, scene))
        for item in scene:
            row, column = 2 * ("bottom" in item.corner), 2 * ("right" in item.corner)
            where = (n, slice(row, row + 2), slice(column, column + 2))
            _label(labels, where, item.colour, item.shape, item.box)
    for n in range(SCENES, SCENES + CHARTS):
        chart = world.make_chart(rng)
        pictures.append(world.draw_chart(rng, chart))
        for column in range(GRID):
            left = column * CELL
            overlaps = [min(bar.box[2], left + CELL) - max(bar.box[0], left) for bar in chart]
            bar = chart[int(np.argmax(overlaps))]
            if max(overlaps) >= 4:
                where = (n, slice(None), column)
                _label(labels, where, bar.colour, "bar", bar.box)
                labels["place"][where] = 1 + world.ORDINALS.index(bar.place)
    letters = rng.integers(0, len(world.LETTERS), LETTERS)
    pictures += [world.draw_letter(rng, world.LETTERS[i]) for i in letters]
    labels["letter"][-LETTERS:] = 1 + torch.from_numpy(letters)[:, None, None]
    labels["height"][-LETTERS:] = labels["side"][-LETTERS:] = 0
    return pictures, {name: value.flatten(1) for name, value in labels.items()}


def _ink(pictures: list[Image.Image]) -> Tensor:
    """The grey of each patch of each token's pixels, 0–1: [pictures, tokens, INK²]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("L"), np.float32) for picture in pictures])) / 255
    ink = F.avg_pool2d(pixels, CELL // INK)
    return F.unfold(ink[:, None], INK, stride=INK).mT


def _label(labels: Labels, where: tuple, colour: str, shape: str, box: tuple[int, ...]) -> None:
    labels["colour"][where] = 1 + WORDS["colour"].index(colour)
    labels["shape"][where] = 1 + WORDS["shape"].index(shape)
    for name, edge in zip(("x1", "y1", "x2", "y2"), box, strict=True):
        labels[name][where] = edge // 2
