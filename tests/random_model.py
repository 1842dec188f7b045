"""The embedded tiny model with random weights: for tests that must not lean on what the model has learned.

Random weights give answers that differ from policy to policy and from prompt to prompt, in no particular form.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import mcit.recipes

PRETRAINED = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"
_folder = tempfile.TemporaryDirectory(prefix="mcit-random-tiny-")  # goes when the test process ends
RANDOM = Path(_folder.name)


def _build() -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(PRETRAINED)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(RANDOM)
    AutoProcessor.from_pretrained(PRETRAINED).save_pretrained(RANDOM)
    (RANDOM / "generation_config.json").write_bytes((PRETRAINED / "generation_config.json").read_bytes())


_build()
