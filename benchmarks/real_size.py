"""The stages of a run at a real model's size: the shape of Qwen2.5-VL-3B, random weights, 448×448 pictures, bfloat16.

    python benchmarks/real_size.py OUT [--shape small] [--launch single]

Random weights learn nothing, but cost what real ones do. Builds the model in `OUT/base`, then `mcit run` tunes two SFT
stages and evaluates, and `mcit train` does a GRPO stage and the two SFT stages with RegLoRA. Prints seconds a step and
peak memory, side by side, and writes them to `OUT/real_size.json`. One GPU with 80 GB; `--shape small` tries the script
on a CPU.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from random_vlm import build

from mcit.data_prep.files import write_json

# Published in the model's config.json: Qwen/Qwen2.5-VL-3B-Instruct.
TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 128000, "vocab_size": 151936}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
VISION |= {"temporal_patch_size": 2, "window_size": 112}
VISION |= {"fullatt_block_indexes": [7, 15, 23, 31]}
# For a try on a CPU.
SMALL_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT |= {
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
SMALL_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
SMALL_VISION |= {"fullatt_block_indexes": [1]}
SIDE = 448  # pixels: 256 tokens
BATCH = 16
ENDS = 0.01  # share of the vocabulary that ends an answer, so that random answers do end: after 100 tokens on average
RECIPE = """
name: real-size
base_model: {{path: base, dtype: bfloat16, processor: {{min_pixels: {pixels}, max_pixels: {pixels}}}}}
stream:
  - {{name: first, train: first.jsonl, test: test.jsonl, style: {style}}}
  - {{name: second, train: second.jsonl, test: test.jsonl, style: {style}}}
train:
  paradigm: {paradigm}
  lineage: stack
  lora: {{r: 64, alpha: 128, dropout: 0.05}}
  global_batch_size: {batch}
  sft: {{args: {{learning_rate: 2e-4, num_train_epochs: 1, logging_steps: 1, gradient_checkpointing: true}}}}
  rft:
    rewards: {{accuracy: 0, format: 1}}  # random answers are never right, but some of them end
    args: {{learning_rate: 2e-5, max_steps: 4, num_generations: 8, max_completion_length: 128, beta: 0.04,
      logging_steps: 1, gradient_checkpointing: true}}
eval: {{cells: last, max_new_tokens: 32, max_model_len: 1024}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=["3b", "small"], default="3b")
    parser.add_argument("--launch", default="single", help="an accelerate configuration of recipes/accelerate/")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    small = options.shape == "small"
    if not (out / "base").exists():
        build_base(out / "base", small)
    if not (out / "test.jsonl").exists():
        write_data(out, 2 * BATCH if small else 16 * BATCH)
    mcit = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()"]
    sft, rft = out / "sft.yaml", out / "rft.yaml"
    sft.write_text(RECIPE.format(pixels=SIDE * SIDE, batch=BATCH, paradigm="sft", style="short"))
    rft.write_text(RECIPE.format(pixels=SIDE * SIDE, batch=2 * BATCH, paradigm="rft", style="brief"))
    reglora = ["--with", "reglora"]
    commands = {"sequential": [["run", sft]], "grpo": [["train", "--stage", 1, rft]]}
    commands["reglora"] = [["train", "--stage", stage, sft, *reglora] for stage in (1, 2)]
    launch = ["--launch", options.launch, "--gpus", 1]
    for name in commands:
        for command in commands[name]:
            subprocess.run([*mcit, *map(str, [*command, *launch, "--run-dir", out / name])], check=True)
    rows = [
        row
        for name in commands
        for folder in sorted((out / name / "stages").iterdir())
        for row in measured(name, folder)
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(out / "real_size.json", {"device": device, **versions, "shape": options.shape, "stages": rows})
    print(device, versions)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def build_base(folder: Path, small: bool) -> None:
    """A Qwen2.5-VL with random weights in bfloat16, and the tiny model's processor with the real one's sizes."""
    pixels = {"min_pixels": SIDE * SIDE, "max_pixels": SIDE * SIDE}
    vision = VISION | SMALL_VISION if small else VISION
    build(folder, SMALL_TEXT if small else TEXT, vision, torch.bfloat16, pixels, ends=ENDS)


def write_data(folder: Path, samples: int) -> None:
    """Two training files of `samples` each and a test file of 16, all about random pictures.

    A question is some 40 tokens, an answer some 10.
    """
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(exist_ok=True)
    for name, count in (("first", samples), ("second", samples), ("test", 16)):
        lines = []
        for number in range(count):
            image = f"pictures/{name}-{number}.jpg"
            pixels = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / image)
            prompt = f"Which shape is at the top left of picture {number}? Answer the question using a single word."
            answer = f"number {rng.integers(1000)}"
            message = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
            lines.append(json.dumps({"images": [image], "prompt": message[0], "completion": message[1]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def measured(run: str, folder: Path) -> list[dict[str, object]]:
    """What a trained stage cost; nothing for the base."""
    if not (folder / "trained.json").exists():
        return []
    trained = json.loads((folder / "trained.json").read_text())
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    steps = {"steps": trained["steps"], "s_per_step": round(log[-1]["train_runtime"] / trained["steps"], 3)}
    peak = trained["cost"]["peak_gpu_bytes"] or trained["cost"]["peak_host_bytes"]
    cost = {"peak_gib": round(peak / 2**30, 1), "stage_s": round(trained["seconds"], 1)}
    return [{"run": run, "stage": folder.name, "mode": trained["mode"], **steps, **cost}]


if __name__ == "__main__":
    main()
