"""Pretrain the embedded tiny VLM from scratch on a CPU, gate it, and save it as any other model is saved.

    python recipes/mini/pretrain.py OUT [--seed 0] [--steps 5500]

First the vision tower learns from dense labels (`tower.py`) and is frozen; then the language model of a Qwen2.5-VL of
1.7 million parameters learns the facts of `mcit.data_prep.mini.facts` in every answer style, several questions a
picture, no picture twice.
The gate asks every fact × style on pictures never seen; one that is not above 95 % stops the script with exit code 1.
Matrix products run in bfloat16, so another processor gives slightly different weights: the gate, not the bits, says
whether the result can be used.
"""

import argparse
import sys
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tower import train_tower
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    get_cosine_schedule_with_warmup,
)

from mcit.data_prep.files import write_json
from mcit.data_prep.mini import facts
from mcit.eval.scorers import get_scorer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIALS += ["<|video_pad|>"]
PATCH, MERGE, LENGTH, PEAK_RATE = 8, 2, 144, 4e-3
IMAGE_TOKENS = (64 // PATCH // MERGE) ** 2
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GATE = 95.0


def build_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 640 tokens, learned from the facts: no unknowns; digits and brackets stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"</?(?:think|answer)>|\d|[\[\]{}<>\"\\,.:]| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = []
    for source in facts.SOURCES:
        if source is facts.echo_facts:
            continue  # random strings must stay single characters
        for _ in range(400):
            for fact in source(rng)[1]:
                for style, reasoning in facts.styles_of(fact):
                    corpus += facts.ask(rng, fact, style, reasoning)[:2]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Not Qwen2TokenizerFast: it replaces the pre-tokenizer by Qwen's own when it is loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=SPECIALS[1:],
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own processor, with 8-pixel patches: a 64×64 picture is 16 tokens."""
    sizes = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 256 * 256},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The tiny Qwen2.5-VL with random weights, float32."""
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.06,  # the usual 0.02 is for wide models: here it stalls for thousands of steps
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 64,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"  # quicker than SDPA at 192 tokens on a CPU
    return Qwen2_5_VLForConditionalGeneration(config)


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
    """48 dialogues: the model's inputs, and for each first answer its fact × style, row, first token and end."""

    inputs: dict[str, torch.Tensor]
    first_answers: list[tuple[str, int, int, int]]


def make_batch(rng: np.random.Generator, processor: Qwen2_5_VLProcessor, native_only: bool) -> Batch:
    """Fresh dialogues, each about one picture, of up to 144 tokens; input_ids, labels and attention_mask are [48, 144].

    Every batch has the same shapes (and as many pictures): bfloat16 kernels on a CPU are compiled for each new shape.
    """

    def tokenize(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    pictures, first_answers = [], []
    ids = torch.full((48, LENGTH), processor.tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    sources = [source for source, count in facts.SOURCES.items() for _ in range(count)]
    for row, source in enumerate(sources):
        picture, known = source(rng)
        if picture is not None:
            pictures.append(picture)
        used = 0
        for place in rng.permutation(len(known)):  # no fact twice: its first answer would give away the second
            fact = known[place]
            styles = facts.styles_of(fact)[: 1 if native_only else None]
            style = styles[rng.integers(len(styles))]
            turn = render([facts.ask(rng, fact, *style)[:2]], picture is not None and used == 0)
            head, body = tokenize(("\n" if used else "") + turn[0][0]), tokenize(turn[1][0])
            start, end = used + len(head), used + len(head) + len(body)
            if end > LENGTH:
                break
            ids[row, used:end] = torch.tensor(head + body)
            labels[row, start:end] = torch.tensor(body)
            attention[row, used:end] = 1
            if used == 0:
                first_answers.append((f"{fact.name} {' '.join(style)}", row, start, end))
            used = end
    images = processor.image_processor(images=pictures, return_tensors="pt")
    types = (ids == processor.image_token_id).int()
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": attention, "mm_token_type_ids": types, **images}
    return Batch(inputs, first_answers)


def train(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, seed: int, steps: int, out: Path
) -> None:
    """Train on fresh pictures every step: the first quarter in the native styles alone, then in all.

    Every 200 steps prints the share of first answers predicted exactly (given their own beginning), worst facts first:
    held-out accuracy, since no picture is seen twice. Every 500 steps the weights so far are saved to `out`.
    """
    rng = np.random.default_rng([seed, 1])
    model.model.visual.requires_grad_(False)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    warm_up_then_cosine = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    start, losses, right = time.monotonic(), [], defaultdict(list)
    for step in range(1, steps + 1):
        batch = make_batch(rng, processor, native_only=step <= steps // 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch.inputs)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *plain], 1.0)
        optimizer.step()
        warm_up_then_cosine.step()
        losses.append(output.loss.item())
        hit = output.logits[:, :-1].argmax(-1) == batch.inputs["input_ids"][:, 1:]
        for name, row, first, end in batch.first_answers:
            right[name].append(bool(hit[row, first - 1 : end - 1].all()))
        if step % 200 == 0:
            worst = sorted((100 * np.mean(hits), name) for name, hits in right.items())
            print(f"step {step}  {time.monotonic() - start:.0f} s  loss {np.mean(losses[-200:]):.4f}")
            print("  " + ", ".join(f"{name} {share:.0f}" for share, name in worst[:12]), flush=True)
            right.clear()
        if step % 500 == 0 or step == steps:
            save(model, processor, out)


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path) -> None:
    """Save as a Hub model is saved; in bfloat16, to halve the size (a recipe loads it as float32, which is exact)."""
    copy = deepcopy(model).bfloat16()
    copy.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    copy.save_pretrained(out)
    processor.save_pretrained(out)


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
    parser.add_argument("--steps", type=int, default=5500)
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
