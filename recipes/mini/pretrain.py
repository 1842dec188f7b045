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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from muon import Muon
from tiny import IMAGE_TOKENS, build_model, build_processor, build_tokenizer, save
from tower import train_tower
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from mcit.data_prep.files import write_json
from mcit.data_prep.mini import facts
from mcit.eval.scorers import get_scorer

ROWS, LENGTH = 24, 144  # a batch
COPIED = 0.2  # the loss of copying (nats) at which facts begin
CAPTIONS = 0.15
PRETEXTS = ("copying", "caption")
MUON, ADAM = 0.01, 3e-3  # peak learning rates
GATE = 95.0


def render(turns: list[tuple[str, str]], picture: bool) -> list[tuple[str, bool]]:
    """A dialogue as pieces of text with whether they carry loss; exactly what the chat template gives."""
    pieces = []
    for i, (prompt, answer) in enumerate(turns):
        image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>" if picture and i == 0 else ""
        pieces.append((f"<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>", True))
        pieces.append(("\n", False))
    return pieces[:-1]


@dataclass
class Batch:
    """Rows of tokens: the model's inputs, where loss is, and each answer's fact × style, row, first token and end."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    answers: list[tuple[str, int, int, int]]


def make_batch(rng: np.random.Generator, processor: Qwen2_5_VLProcessor, accuracy: dict[str, float]) -> Batch:
    """Fresh dialogues, each about one picture, of up to 144 tokens; asks most about what is known least.

    `accuracy` is the share of right answers lately, 0–1, by fact × style.
    """
    encode = processor.tokenizer.backend_tokenizer.encode
    pictures, answers = [], []
    ids = torch.full((ROWS, LENGTH), processor.tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    sources = [source for source, count in facts.SOURCES.items() for _ in range(count)]
    for row, source in enumerate(sources):
        picture, known = source(rng)
        if picture is not None:
            pictures.append(picture)
        used = 0
        for place in rng.permutation(len(known)):  # no fact twice: its first answer would give away the second
            fact = known[place]
            styles = facts.styles_of(fact)
            names = [f"{fact.name} {' '.join(style)}" for style in styles]
            weights = np.array([1.1 - accuracy.get(name, 0.5) for name in names])
            choice = rng.choice(len(styles), p=weights / weights.sum())
            (head_text, _), (body_text, _) = render(
                [facts.ask(rng, fact, *styles[choice])[:2]], picture is not None and used == 0
            )[:2]
            head = encode(("\n" if used else "") + head_text, add_special_tokens=False).ids
            body = encode(body_text, add_special_tokens=False).ids
            start, end = used + len(head), used + len(head) + len(body)
            if end > LENGTH:
                continue
            ids[row, used:end] = torch.tensor(head + body)
            labels[row, start:end] = torch.tensor(body)
            attention[row, used:end] = 1
            answers.append((names[choice], row, start, end))
            used = end
    images = processor.image_processor(images=pictures, return_tensors="pt")
    types = (ids == processor.image_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": attention, "mm_token_type_ids": types, **images}
    return Batch(inputs, labels, answers)


def make_copying(rng: np.random.Generator, processor: Qwen2_5_VLProcessor) -> Batch:
    """Random tokens, repeated with a period of 4 to 24; loss on the repetitions.

    Matching an answer to an option, or a word to what was thought, needs attention heads that look for an earlier
    occurrence. They form in minutes on this, and hardly at all on short answers (docs/mini.md).
    """
    ids = torch.empty((ROWS, LENGTH), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row in range(ROWS):
        period = int(rng.integers(4, 25))
        piece = rng.integers(7, len(processor.tokenizer), period)
        ids[row] = torch.from_numpy(np.resize(piece, LENGTH))
        labels[row, period + 1 :] = ids[row, period + 1 :]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    return Batch(inputs, labels, [("copying", row, LENGTH // 2, LENGTH) for row in range(ROWS)])


def make_captions(rng: np.random.Generator, processor: Qwen2_5_VLProcessor) -> Batch:
    """Pictures described sentence by sentence, in random order: what a question asks for, at many more words a picture."""
    tokenizer, pictures, answers = processor.tokenizer, [], []
    ids = torch.full((ROWS, LENGTH), tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    sources = [source for source, count in facts.SOURCES.items() for _ in range(count)]
    seen = [source for source in sources if source(rng)[0] is not None]
    for row in range(ROWS):
        picture, known = seen[row % len(seen)](rng)
        pictures.append(picture)
        sentences = [f"{fact.think} {fact.answer}" if fact.style == "bbox" else fact.think for fact in known]
        caption = " ".join(str(sentence) for sentence in rng.permutation(sorted(set(sentences))))
        head, body = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text, _ in render([("Describe the picture.", caption)], True)[:2]
        )
        used = min(LENGTH, len(head) + len(body))
        ids[row, :used] = torch.tensor((head + body)[:used])
        labels[row, len(head) : used] = ids[row, len(head) : used]
        attention[row, :used] = 1
        answers.append(("caption", row, len(head), used))
    images = processor.image_processor(images=pictures, return_tensors="pt")
    types = (ids == processor.image_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": attention, "mm_token_type_ids": types, **images}
    return Batch(inputs, labels, answers)


def train(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int, out: Path
) -> None:
    """Train on fresh pictures every step: copying, then facts in their native styles, then in all styles.

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
    start, losses, right, accuracy, copying = time.monotonic(), [], defaultdict(list), {}, True
    for step in range(1, steps + 1):
        copying = copying and np.mean(losses[-10:] or [9.0]) > COPIED
        if copying:
            batch = make_copying(rng, processor)
        elif step <= CAPTIONS * steps:
            batch = make_captions(rng, processor)
        else:
            batch = make_batch(rng, processor, accuracy)
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
            found = hit[row, first:end]
            right[name].append(float(found.float().mean() if name in PRETEXTS else found.all()))
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
            texts = [
                "".join(t for t, _ in render([(s["prompt"][0]["content"], "")], picture is not None)[:1])
                for picture, s in part
            ]
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
