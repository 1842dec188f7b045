"""Policies on the embedded tiny model for the tests of evaluation: random LoRAs, a merged model, a run folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from random_model import RANDOM as TINY
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit.data_prep.files import write_json, write_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.engines.base import Policy, read_policy
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, write_serving

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def serving(stage: int, name: str, **fields: Any) -> Serving:
    digest = hash_model(str(TINY))
    known = {"kind": "base", "base": str(TINY), "dtype": "float32", "base_hash": digest, "hash": digest}
    return Serving(stage=stage, name=name, **(known | fields))


def base_policy(stages: Path, **fields: Any) -> Policy:
    folder = stages / "00-base"
    folder.mkdir(parents=True, exist_ok=True)
    write_serving(folder, serving(0, "base", **fields))
    return read_policy(folder)


def lora_policy(
    stages: Path, stage: int, name: str, rank: int, *, targets: str = LANGUAGE, zero: bool = False, **fields: Any
) -> Policy:
    """A stage whose adapter has random factors, scaled so that it changes the model a good deal, or B = 0."""
    folder = stages / f"{stage:02d}-{name}"
    torch.manual_seed(stage)
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    for key, parameter in model.named_parameters():
        if "lora_B" in key and not zero:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    known = {"kind": "adapter", "path": "adapter", "rank": rank, "hash": f"{stage:064x}"}
    write_serving(folder, serving(stage, name, **(known | fields)))
    return read_policy(folder)


def merged_policy(stages: Path, stage: int, name: str, adapter: Policy) -> Policy:
    """A stage that serves another stage's adapter merged into the base."""
    folder = stages / f"{stage:02d}-{name}"
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter.adapter)).merge_and_unload().save_pretrained(folder / "merged")
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder / "merged")
    write_serving(folder, serving(stage, name, kind="merged", path="merged", hash=hash_model(str(folder / "merged"))))
    return read_policy(folder)


def make_images(folder: Path, count: int) -> list[Path]:
    """Noise of different sizes."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        pixels = generator.integers(0, 256, (48 + 16 * (i % 2), 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def make_task(run: Path, name: str, images: int, count: int) -> list[Sample]:
    """A prepared task of yes/no questions with `images` images each, in RUN/data/<name>."""
    folder = run / "data" / name
    make_images(folder / "images", 4)
    samples: list[Sample] = [
        {
            "id": f"{name}-{i}",
            "task": name,
            "images": [f"images/{(i + j) % 4}.png" for j in range(images)],
            "prompt": [{"role": "user", "content": f"Is there a circle in row {i}?\nAnswer with yes or no."}],
            "completion": [{"role": "assistant", "content": "yes" if i % 2 else "no"}],
            "references": ["yes" if i % 2 else "no"],
            "style": "yes_no",
            "reasoning": "none",
            "meta": {"image_id": f"image-{i % 4}"} if images else {},
        }
        for i in range(count)
    ]
    write_jsonl(folder / "test.jsonl", samples)
    task = {
        "name": name,
        "style": "yes_no",
        "reasoning": "none",
        "scorer": "yes_no",
        "reward": "same",
        "image_root": ".",
        "counts": {"test": count},
        "notes": [],
        "hash": f"data of {name}",
        "test_hash": f"test data of {name}, {count}",
    }
    write_json(folder / "task.json", task)
    return samples
