"""Pretrain the vision tower, as a real VLM's tower is: from dense labels for every image token, a few minutes.

Without it, so small a model spends most of its pretraining finding out that the picture matters. Linear heads on the
projector's output predict, for each of the 16 tokens, its row and column, and the colour, shape and box of what stands
there; and the letter from all tokens together. The heads are thrown away.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, get_cosine_schedule_with_warmup

from mcit.data_prep.mini import world

GRID, CELL = 4, world.SIZE // 4  # tokens a side, pixels a token
NOTHING = -100  # the label that carries no loss
HEADS = {"row": GRID, "column": GRID, "colour": len(world.COLOURS) + 1, "shape": len(world.SHAPES) + 2}
HEADS |= dict.fromkeys(("x1", "y1", "x2", "y2"), world.SIZE // 2 + 1)  # boxes lie on a 2-pixel grid


def train_tower(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int
) -> None:
    """Train tower and projector for `steps` batches of 60 fresh pictures; prints each head's accuracy."""
    rng, visual = np.random.default_rng([seed, 3]), model.model.visual
    width = model.config.vision_config.out_hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in HEADS.items()})
    letter_head = nn.Linear(GRID * GRID * width, len(world.LETTERS))
    parameters = [*visual.parameters(), *heads.parameters(), *letter_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule, start = get_cosine_schedule_with_warmup(optimizer, 100, steps), time.monotonic()
    for step in range(1, steps + 1):
        pictures, labels, letters = _batch(rng)
        inputs = processor.image_processor(images=pictures, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            tokens = tokens.view(len(pictures), GRID * GRID, width)
            scores = {name: head(tokens) for name, head in heads.items()}
            letter_scores = letter_head(tokens[-len(letters) :].flatten(1))
        losses = [F.cross_entropy(scores[n].float().flatten(0, 1), labels[n].flatten()) for n in HEADS]
        losses.append(F.cross_entropy(letter_scores.float(), letters))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = {n: scores[n].argmax(-1)[labels[n] != NOTHING] == labels[n][labels[n] != NOTHING] for n in HEADS}
            right["letter"] = letter_scores.argmax(-1) == letters
            shares = ", ".join(f"{name} {100 * hit.float().mean():.0f}" for name, hit in right.items())
            print(f"tower {step}  {time.monotonic() - start:.0f} s  {shares}", flush=True)


def _batch(rng: np.random.Generator) -> tuple[list[Image.Image], dict[str, torch.Tensor], torch.Tensor]:
    """20 scenes, 20 charts, 20 letters; labels by head, each [60, 16]; the letters' indices [20]."""
    pictures, labels = [], {name: torch.full((60, GRID, GRID), NOTHING) for name in HEADS}
    labels["row"][:] = torch.arange(GRID)[:, None]
    labels["column"][:] = torch.arange(GRID)
    for n in range(20):
        scene = world.make_scene(rng)
        pictures.append(world.draw_scene(rng, scene))
        labels["colour"][n] = labels["shape"][n] = 0
        for item in scene:
            row, column = 2 * ("bottom" in item.corner), 2 * ("right" in item.corner)
            place = (n, slice(row, row + 2), slice(column, column + 2))
            _label(labels, place, item.colour, 1 + world.SHAPES.index(item.shape), item.box)
    for n in range(20, 40):
        chart = world.make_chart(rng)
        pictures.append(world.draw_chart(rng, chart))
        labels["colour"][n] = labels["shape"][n] = 0
        for column in range(GRID):
            left = column * CELL
            overlaps = [min(bar.box[2], left + CELL) - max(bar.box[0], left) for bar in chart]
            bar = chart[int(np.argmax(overlaps))]
            if max(overlaps) >= 4:
                _label(labels, (n, slice(None), column), bar.colour, len(world.SHAPES) + 1, bar.box)
    letters = rng.integers(0, len(world.LETTERS), 20)
    pictures += [world.draw_letter(rng, world.LETTERS[i]) for i in letters]
    return pictures, {name: value.flatten(1) for name, value in labels.items()}, torch.tensor(letters)


def _label(labels: dict[str, torch.Tensor], place: tuple, colour: str, shape: int, box: tuple[int, ...]) -> None:
    labels["colour"][place] = 1 + list(world.COLOURS).index(colour)
    labels["shape"][place] = shape
    for name, edge in zip(("x1", "y1", "x2", "y2"), box, strict=True):
        labels[name][place] = edge // 2
