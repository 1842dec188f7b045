"""Pretrain the embedded tiny VLM from scratch on a CPU, gate it, and save it as any other model is saved.

    python recipes/mini/pretrain.py OUT [--seed 0] [--steps 9000]

First the vision tower learns from dense labels (`tower.py`) and is frozen; then the language model of a Qwen2.5-VL of
1.7 million parameters learns to copy, and then the facts of `mcit.data_prep.mini.facts` in every answer style, several
questions a picture, no picture twice.
The gate asks every fact × style on pictures never seen; one that is not above 95 % stops the script with exit code 1.
Matrix products run in bfloat16, so another processor gives slightly different weights: the gate, not the bits, says
whether the result can be used.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lessons import Row, agree, caption, choose, copy, opening, pack, questions
from muon import Muon
from tiny import build_model, build_processor, build_tokenizer, save
from tower import train_tower
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from mcit.data_prep.files import write_json
from mcit.data_prep.mini import facts
from mcit.eval.scorers import get_scorer

SOURCES = [source for source, count in facts.SOURCES.items() for _ in range(count)]  # of the rows of a batch
FIRST = 0.1  # share of the steps that go to captions and drills
MUON, ADAM = 0.01, 3e-3  # peak learning rates
GATE = 95.0


def first_lesson(rng: np.random.Generator) -> list[Row]:
    """Half the rows describe pictures, half are drills."""
    seen = [source for source in SOURCES if source in (facts.scene_facts, facts.chart_facts, facts.letter_facts)]
    captions = [caption(rng, seen[i % len(seen)]) for i in range(len(SOURCES) // 2)]
    return captions + [(choose, agree, copy)[i % 3](rng) for i in range(len(SOURCES) - len(captions))]


def train(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int, out: Path
) -> None:
    """Train on fresh pictures every step: captions and drills, then questions.

    Every 200 steps prints the share of answers predicted exactly (given their own beginning), worst facts first:
    held-out accuracy, since no picture is seen twice. Every 500 steps the weights so far are saved to `out`.
    """
    rng = np.random.default_rng([seed, 1])
    model.model.visual.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in trained.items() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in trained.items() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        Muon(hidden, lr=MUON),
        torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    start, losses, right, accuracy = time.monotonic(), [], defaultdict(list), {}
    for step in range(1, steps + 1):
        rows = first_lesson(rng) if step <= FIRST * steps else [questions(rng, source, accuracy) for source in SOURCES]
        batch = pack(rows, processor)
        states = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]
        place = batch.labels[:, 1:] != -100
        logits = model.lm_head(states[place])
        target = batch.labels[:, 1:][place]
        loss = F.cross_entropy(logits, target)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        hit = torch.ones_like(batch.labels, dtype=torch.bool)
        hit[:, 1:][place] = logits.argmax(-1) == target
        for name, row, first, end in batch.answers:
            right[name].append(bool(hit[row, first:end].all()))
        if step % 200 == 0:
            accuracy.update({name: float(np.mean(hits)) for name, hits in right.items()})
            worst = sorted((100 * share, name) for name, share in accuracy.items() if name in right)
            print(f"step {step}  {time.monotonic() - start:.0f} s  loss {np.mean(losses[-200:]):.4f}")
            print("  " + ", ".join(f"{name} {share:.0f}" for share, name in worst), flush=True)
            right.clear()
        if step % 500 == 0 or step == steps:
            save(model, processor, out)


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: 50 steps of warm-up, constant, and down to zero over the last half."""
    return min(1.0, (step + 1) / 50, 2 * (1 - step / steps))


@torch.inference_mode()
def gate(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, count: int
) -> dict[str, float]:
    """Exact match (boxes: IoU > 0.5), %, of greedy answers to `count` new questions for each fact × style."""
    rng = np.random.default_rng([seed, 2])
    questions = defaultdict(list)
    for source in facts.SOURCES:
        for number in range(count):
            picture, known = source(rng)
            for fact in known:
                for style, reasoning in facts.styles_of(fact):
                    sample = facts.fact_sample(rng, fact, style, reasoning, number)
                    questions[f"{fact.name} {style} {reasoning}"].append((picture, sample))
    scores = {}
    for name, items in questions.items():
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
            out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
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
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--gate-only", action="store_true", help="only gate the model in OUT")
    arguments = parser.parse_args()
    if not arguments.gate_only:
        processor = build_processor(build_tokenizer(np.random.default_rng([arguments.seed, 0])))
        model = build_model(processor.tokenizer, arguments.seed)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
        train_tower(model, processor, arguments.seed, 1500)
        train(model, processor, arguments.seed, arguments.steps, arguments.out)
    processor = Qwen2_5_VLProcessor.from_pretrained(arguments.out)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.out, dtype=torch.float32).eval()
    scores = gate(model, processor, arguments.seed, 200)
    for name, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"{score:6.1f}  {name}")
    write_json(arguments.out.with_name(f"{arguments.out.name}.gate.json"), scores)
    below = [name for name, score in scores.items() if score <= GATE]
    if below:
        sys.exit(f"below the gate of {GATE} %: {', '.join(below)}")


if __name__ == "__main__":
    main()
