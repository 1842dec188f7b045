"""GeRe: what the anchor's states take on disk, and what replayed samples add to a step.

    python benchmarks/gere.py OUT.json

Files are written for drawn hidden states, half of the samples with images, and compared with the same states in
float32, which is what the official code keeps; the loss from a file is compared with the loss from those. A step is
forward and backward pass of a random language model with LoRA: the batch alone, with the general samples in the same
forward pass, and with a forward pass for each, in turn. Seconds are those of the processor, for other work on the
machine not to count: give one thread (OMP_NUM_THREADS=1).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from figures import figure
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mcit.data_prep.files import write_json
from mcit.pipeline.methods.anchor import Anchor, anchor_path, write_anchor
from mcit.pipeline.methods.keys import unpack
from mcit.pipeline.methods.ternary import Moments, margin_loss, states
from mcit.pipeline.training.replay import Replayed, backbone

UNITS = (1024, 2048, 3584, 4096, 8192)  # the last are those of 7 to 8 and 70 billion parameters
SAMPLES, TOKENS = 16, 563  # tokens: GeRe (code)
BATCH, PER_BATCH, LENGTH = 16, 4, 128
REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    files, taken = [size_of(units) for units in UNITS], times()
    steps = {form: median(seconds) for form, seconds in taken.items()}
    one, two = "in one forward pass", "in two"
    figures = [figure("GeRe's replay in the batch's own forward pass", "a pass of its own", taken[one], taken[two])]
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    write_json(options.out, {**versions, "files": files, "steps": steps, "figures": figures})
    print("| units | float32, MB | file, MB | smaller | difference of the losses |\n|---|---|---|---|---|")
    for row in files:
        sizes = f"{row['float32'] / 1e6:.1f} | {row['file'] / 1e6:.2f} | {row['float32'] / row['file']:.2f} ×"
        print(f"| {row['units']} | {sizes} | {row['gap']:.1g} |")
    print("\n| a step | CPU s | extra |\n|---|---|---|")
    for form, seconds in steps.items():
        print(f"| {form} | {seconds:.3f} | {seconds / steps['alone'] - 1:+.1%} |")


class Alone:
    """An accelerator of one process."""

    num_processes, process_index, is_main_process, device = 1, 0, True, torch.device("cpu")
    gather = staticmethod(lambda tensor: tensor)
    wait_for_everyone = staticmethod(lambda: None)


def size_of(units: int) -> dict[str, Any]:
    """Bytes of the states in float32 and in the file, and the largest difference of a sample's loss from either."""

    def hidden(sample: int) -> Tensor:
        return torch.randn(TOKENS, units, generator=torch.Generator().manual_seed(sample))

    def look() -> Iterator[Replayed]:
        for sample in range(SAMPLES):
            yield Replayed([sample], [TOKENS], hidden(sample)[None], torch.zeros(1, TOKENS))

    kinds = ["text", "images"] * (SAMPLES // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = anchor_path(Path(folder), {"sigmas": 1.0})
        write_anchor(path, {"sigmas": 1.0}, look, kinds, units=units, accelerator=Alone(), work=Path(folder))
        anchor, gaps = Anchor(path, {"sigmas": 1.0}), []
        for sample in range(0, SAMPLES, 4):
            now = hidden(sample) + 0.1 * hidden(sample + 1000)
            thresholds = anchor.thresholds[kinds[sample]]
            loss = margin_loss(now, unpack(anchor.of(sample, TOKENS), 2, units), thresholds)
            gaps.append(abs(loss - margin_loss(now, states(hidden(sample), thresholds), thresholds)).item())
        return {"units": units, "float32": SAMPLES * TOKENS * units * 4, "file": path.stat().st_size, "gap": max(gaps)}


def times() -> dict[str, list[float]]:
    """CPU seconds of a step in each form, in turn."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 8000}
    config = Qwen2Config(**sizes, num_attention_heads=8, num_key_value_heads=2)
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"))
    head = model.get_base_model().lm_head
    ids = torch.randint(8000, (BATCH + PER_BATCH, LENGTH))
    with torch.no_grad():
        then = backbone(model)(input_ids=ids).last_hidden_state[BATCH:] + 0.1 * torch.randn(PER_BATCH, LENGTH, 512)
    thresholds = Moments.of(then.flatten(0, 1)).thresholds(1.0)
    kept = states(then.flatten(0, 1), thresholds).view_as(then)

    def answers(hidden: Tensor) -> Tensor:  # the last quarter of a sample is its answer
        first = LENGTH * 3 // 4
        return F.cross_entropy(head(hidden[:BATCH, first:-1]).flatten(0, 1), ids[:BATCH, first + 1 :].flatten())

    def matched(hidden: Tensor) -> Tensor:
        return torch.stack([margin_loss(*pair, thresholds) for pair in zip(hidden, kept, strict=True)]).mean()

    def run(rows: Tensor) -> Tensor:
        return backbone(model)(input_ids=rows, use_cache=False).last_hidden_state

    def together() -> Tensor:
        hidden = run(ids)
        return answers(hidden) + matched(hidden[BATCH:])

    forms: dict[str, Callable[[], Tensor]] = {
        "alone": lambda: answers(run(ids[:BATCH])),
        "in one forward pass": together,
        "in two": lambda: answers(run(ids[:BATCH])) + matched(run(ids[BATCH:])),
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(REPEATS):
        for form, loss in forms.items():
            start = time.process_time()
            loss().backward()
            seconds[form].append(time.process_time() - start)
    return {form: found[1:] for form, found in seconds.items()}


if __name__ == "__main__":
    main()
