"""Pretrain the embedded tiny VLM from scratch, gate it, and save it as any other model is saved.

    python recipes/mini/pretrain.py OUT [--seed 0] [--steps 3500]

First the vision tower learns from dense labels (`tower.py`) and is frozen; then the language model of a Qwen2.5-VL of
1.8 million parameters learns to match words, to describe pictures, and to answer questions about the facts of
`mcit.data_prep.mini.facts` in every style, no picture twice (`lessons.py`).
The gate asks every fact × style on pictures never seen; one that is not above 95 % stops the script with exit code 1.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lessons import Row, agree, caption, choose, opening, pack, questions
from muon import Muon
from PIL import Image
from tiny import build_model, build_processor, build_tokenizer, save
from tower import train_tower
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from mcit.data_prep.files import write_json
from mcit.data_prep.mini import facts
from mcit.eval.scorers import get_scorer

SOURCES = [source for source, count in facts.SOURCES.items() for _ in range(count)]  # of the rows of a batch
FULL = partial(facts.scene_facts, count=4)  # of fewer shapes, what else is asked gives too many answers away
NATIVES = [FULL if s is facts.scene_facts else s for s in SOURCES if s is not facts.match_facts]
PICTURES = [source for source in facts.SOURCES if source in (facts.scene_facts, facts.chart_facts, facts.letter_facts)]
DESCRIBED = {  # what captions tell of each kind of picture
    FULL: ("told colour_at", "told corner_of"),
    facts.chart_facts: ("told bar_colour", "told box_of_bar"),
    facts.letter_facts: ("told letter",),
}
KNOWN, PATIENCE = 0.9, 2500  # share of right answers, and steps, at most, until a lesson has them
NEARLY = 0.8  # where the rest comes by itself as the learning rate falls, and takes long before
MUON, ADAM = 0.01, 3e-3  # peak learning rates
GATE, ASKED = 95.0, 1000  # %, of as many questions of each pair: of 200 a score of 99 can come out below
EAGER = {"attn_implementation": "eager"}  # quicker than SDPA at 144 tokens on a CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Lessons = Iterator[tuple[list[Row], float]]  # a batch's rows, and how much of the learning rate it gets


def choices(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Which letter stands before a word: while heads still match words as they did at the start, this is quick."""
    for _ in _until_known(accuracy, "choose"):
        yield [choose(rng, near=True) for _ in range(12)], 1.0


def captions(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Pictures described, until their words are known; the kinds known least most often."""
    sources = list(DESCRIBED)
    for _ in _until_known(accuracy, "told colour_at", "told corner_of", "told bar_colour"):
        weights = np.array([1.05 - min(accuracy.get(name, 0.0) for name in told) for told in DESCRIBED.values()])
        kinds = rng.choice(len(sources), size=12, p=weights / weights.sum())
        yield [caption(rng, sources[kind]) for kind in kinds] + _choices(rng), 1.0


def natives(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Every fact in its native style, of full pictures, until those that a word answers are known."""
    words = ("colour_at", "shape_at", "corner_of", "bar_colour", "letter")
    for _ in _until_known(accuracy, *(f"{word} short none" for word in words)):
        yield [questions(rng, source, accuracy, native=True) for source in NATIVES] + _choices(rng), 1.0


def agreement(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Whether two words are the same; asked from further away only once it is known from near."""
    for near in (True, False):
        for _ in _until_known(accuracy, "choose", "agree", *([] if near else ["agree from afar"])):
            pictures = [questions(rng, source, accuracy, native=True) for source in PICTURES for _ in range(2)]
            yield pictures + [drill(rng, near) for drill in (choose, agree) for _ in range(6)], 1.0


def matching(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """The same two as they are asked in dialogues: the answer before the options and the format sentence."""
    for _ in _until_known(accuracy, "same_option mcq none", "same_answer yes_no none"):
        pictures = [questions(rng, source, accuracy, native=True) for source in PICTURES for _ in range(2)]
        near = [drill(rng, near=False) for drill in (choose, agree) for _ in range(2)]
        yield pictures + near + [questions(rng, facts.match_facts, accuracy) for _ in range(10)], 1.0


def dialogues(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Questions in every style, those known least most often, until all words but those for shapes nearly are."""
    words = ("colour_at", "corner_of", "bar_colour", "letter")
    asked = [f"{word} {style} none" for word in words for style in ("mcq", "yes_no")]
    for _ in _until_known(accuracy, *asked, share=NEARLY):
        yield [questions(rng, source, accuracy) for source in SOURCES], 1.0


def which_shape(rng: np.random.Generator) -> tuple[Image.Image, list[facts.Fact]]:
    """A full picture and which shape is where, nothing else."""
    picture, known = FULL(rng)
    return picture, [fact for fact in known if fact.name == "shape_at"]


def shapes(rng: np.random.Generator, accuracy: dict[str, float]) -> Lessons:
    """Which shape is where, the slowest, beside the rest."""
    for _ in _until_known(accuracy, "shape_at mcq none", share=NEARLY):
        yield [questions(rng, source, accuracy) for source in 12 * [which_shape] + 2 * list(facts.SOURCES)], 1.0


def last(rng: np.random.Generator, accuracy: dict[str, float], steps: int) -> Lessons:
    """Dialogues again, with more of what is learned slowest, while the learning rate falls to zero."""
    for step in range(steps):
        sources = SOURCES + 3 * [which_shape] + 5 * [facts.letter_facts]
        yield [questions(rng, source, accuracy) for source in sources], 1 - step / steps


def _choices(rng: np.random.Generator) -> list[Row]:
    """A few, so that choosing is not forgotten."""
    return [choose(rng, near=True) for _ in range(3)]


def _until_known(accuracy: dict[str, float], *names: str, share: float = KNOWN) -> Iterator[None]:
    """For each step of a lesson, until each of `names` has been known: the next waits for it, since none is
    learned beside another.

    `accuracy`, 0–1, by what is asked, is looked at as it changes. Not all have to be known at the same moment, which at
    a full learning rate comes late or never. What is not known in time ends the script.
    """
    left = list(names)
    for _ in range(PATIENCE):
        left = [name for name in left if accuracy.get(name, 0.0) <= share]
        if not left:
            return
        yield
    sys.exit(f"not known after {PATIENCE} steps: {', '.join(left)}")


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    lessons: Callable[[dict[str, float]], Lessons],
) -> None:
    """Train the language model on `lessons`, given the accuracies as they change; the tower stays as it is.

    Every 200 steps prints the share of answers predicted exactly (given their own beginning), worst first: held-out
    accuracy, since no row is seen twice.
    """
    model.model.visual.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in trained.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in trained.items() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        Muon(hidden, lr=MUON),
        torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.98), eps=1e-5, weight_decay=0.0),
    ]
    start, losses, right = time.monotonic(), [], defaultdict(list)
    accuracy: dict[str, float] = {}
    for step, (rows, share) in enumerate(lessons(accuracy), 1):
        batch = pack(rows, processor).to(DEVICE)
        states = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]
        place = batch.labels[:, 1:] != -100
        logits = model.lm_head(states[place])
        target = batch.labels[:, 1:][place]
        loss = F.cross_entropy(logits, target)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimizer, rate in zip(optimizers, (MUON, ADAM), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(step / 50, share)
            optimizer.step()
        losses.append(loss.item())
        hit = torch.ones_like(batch.labels, dtype=torch.bool)
        hit[:, 1:][place] = logits.argmax(-1) == target
        hit = hit.cpu()
        for name, row, first, end in batch.answers:
            right[name].append(bool(hit[row, first:end].all()))
        if step % 50 == 0:
            accuracy.update({name: float(np.mean(hits[-1000:])) for name, hits in right.items()})
        if step % 200 == 0:
            worst = sorted((100 * accuracy[name], name) for name in right)
            print(f"step {step}  {time.monotonic() - start:.0f} s  loss {np.mean(losses[-200:]):.4f}")
            print("  " + ", ".join(f"{name} {share:.0f}" for share, name in worst), flush=True)
            right.clear()


@torch.inference_mode()
def gate(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, count: int
) -> dict[str, float]:
    """Exact match (boxes: IoU > 0.5), %, of greedy answers to `count` new questions for each fact × style."""
    rng = np.random.default_rng([seed, 2])
    asked = defaultdict(list)
    for source in facts.SOURCES:
        for number in range(count):
            picture, known = source(rng)
            for fact in known:
                for style, reasoning in facts.styles_of(fact):
                    sample = facts.fact_sample(rng, fact, style, reasoning, number)
                    asked[f"{fact.name} {style} {reasoning}"].append((picture, sample))
    scores = {}
    for name, items in asked.items():
        correct = []
        for begin in range(0, len(items), 100):
            part = items[begin : begin + 100]
            texts = [opening(s["prompt"][0]["content"], picture is not None) for picture, s in part]
            inputs = processor.tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
            if part[0][0] is not None:
                inputs.update(processor.image_processor(images=[p for p, _ in part], return_tensors="pt"))
            out = model.generate(**inputs.to(DEVICE), max_new_tokens=64, do_sample=False)
            answers = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for answer, (_, sample) in zip(answers, part, strict=True):
                gold = sample["completion"][0]["content"]
                if sample["style"] == "bbox" and sample["reasoning"] == "none":
                    correct.append(get_scorer("bbox").score(answer, [gold], sample) == 100)
                elif sample["style"] == "bbox":
                    head, tail = answer.partition("<answer>")[::2]
                    box = tail.removesuffix("</answer>")
                    right = get_scorer("bbox").score(box, sample["references"], sample) == 100
                    correct.append(right and head == gold.partition("<answer>")[0])
                else:
                    correct.append(answer == gold)
        scores[name] = 100 * float(np.mean(correct))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3500, help="of the last lesson")
    arguments = parser.parse_args()
    processor = build_processor(build_tokenizer())
    model = build_model(processor.tokenizer, arguments.seed).to(DEVICE)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    teachers = {"choices": choices, "captions": captions, "natives": natives, "agreement": agreement}
    teachers |= {"matching": matching, "dialogues": dialogues, "shapes": shapes}
    teachers["last"] = partial(last, steps=arguments.steps)
    for number, name in enumerate(("tower", *teachers)):
        learned, rng = arguments.out / name, np.random.default_rng([arguments.seed, 1, number])
        if not learned.exists():
            print(f"{name}:")
            if name == "tower":
                train_tower(model, processor, rng, 1400)
            else:
                train(model, processor, partial(teachers[name], rng))
            model.save_pretrained(unfinished := arguments.out / f"{name}.unfinished")
            unfinished.rename(learned)  # so that a folder with a lesson's name is whole
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(learned, dtype=torch.float32, **EAGER).to(DEVICE)
    save(model, processor, arguments.out / "tiny_vlm")
    processor = Qwen2_5_VLProcessor.from_pretrained(arguments.out / "tiny_vlm")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.out / "tiny_vlm", dtype=torch.float32)
    scores = gate(model.to(DEVICE).eval(), processor, arguments.seed, ASKED)
    for name, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"{score:6.1f}  {name}")
    write_json(arguments.out / "gate.json", scores)
    below = [name for name, score in scores.items() if score <= GATE]
    if below:
        sys.exit(f"below the gate of {GATE} %: {', '.join(below)}")


if __name__ == "__main__":
    main()
