"""The GPU memory of a stage at published sizes, by `mcit.pipeline.planning.memory`; on the meta device, not run.

    python benchmarks/memory.py            # the tables of docs/cluster.md
    python benchmarks/memory.py --trace    # the formula's activations against what torch would allocate: minutes

LoRA of rank 64 on the language model, with dropout, bfloat16, AdamW, gradient checkpointing; a sample has 2,048 tokens.
The trace runs forward and backward passes on tensors without content (`FakeTensorMode`), adds up what is allocated and
freed, and prints the peak beyond weights, optimizer and gradients: of two layers, since layers are alike.
"""

import argparse
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from published import published

from mcit.pipeline.planning.memory import Training, measure, training_memory
from mcit.pipeline.planning.outlook import look_ahead
from mcit.pipeline.policy.lineage import enter
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.training.replay import backbone

GIB = 2**30
MODELS = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct")
RANK = 64
HARDWARE = (
    ("1 GPU", "single", 1),
    ("8, `ddp`", "ddp", 8),
    ("8, `zero2`", "zero2", 8),
    ("8, `zero3`", "zero3", 8),
    ("32, `zero3`", "zero3", 32),
)
ROWS, TOKENS = 16, 295  # of a traced micro-batch: those of benchmarks/real_size.json


def meta_model(name: str, layers: int | None = None) -> Any:
    """A published model of which there are only shapes; with `layers`, of that many decoder layers."""
    config = published()[name]
    if layers:
        config.get_text_config().num_hidden_layers = layers
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def stage(dropout: float = 0.05) -> Any:
    """With LoRA as above."""
    settings = [f"train.lora={{r: {RANK}, alpha: {2 * RANK}, dropout: {dropout}}}"]
    return load_recipe("mini/sequential", settings).stages[0]


def tables() -> Iterable[list[str]]:
    """The rows of docs/cluster.md."""
    yield ["model", "GPUs", "SFT, 1 sample", "8 samples", "1, after 7 stages of `stack`", "RFT, 8 answers of 512"]
    for name in MODELS:
        model = meta_model(name)
        shapes, outlook = measure(model), look_ahead(stage(), model, 0, 0)
        for label, mode, processes in HARDWARE:
            cells = []
            for samples, past, rft in ((1, 0, False), (8, 0, False), (1, 7 * RANK, False), (8, 0, True)):
                training = Training(
                    shapes,
                    outlook.lora,
                    outlook.width,
                    past_rank=past,
                    mode=mode,
                    processes=processes,
                    samples=samples,
                    at_once=8 if rft else 0,
                    dropout=not rft,
                )
                cells.append(f"{training_memory(training).total / GIB:.0f}")
            yield [_short(name), label, *cells]


class Allocated(TorchDispatchMode):
    """Adds up the bytes of the tensors that there are while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def free(_: Any) -> None:
            if self.known.pop(key, None) is not None:
                self.now -= size

        if key not in self.known:
            self.known[key] = weakref.ref(storage, free)
            self.now += size
            self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def trace(name: str, checkpointing: bool, dropout: float) -> list[str]:
    """Activations by the formula and by torch, GiB."""
    model = meta_model(name, layers=2)
    shapes, outlook = measure(model), look_ahead(stage(), model, 0, 0)
    training = Training(
        shapes,
        outlook.lora,
        outlook.width,
        samples=ROWS,
        tokens=TOKENS,
        checkpointing=checkpointing,
        dropout=dropout > 0,
    )
    tuned = enter(model, None, stage(dropout).train)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(tuned)
        tuned.train()
        if checkpointing:
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
            tuned.enable_input_require_grads()
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        places = torch.zeros(3, ROWS, TOKENS, dtype=torch.long)
        with Allocated() as allocated:
            for weight in (*tuned.parameters(), *tuned.buffers()):
                allocated.add(weight)
            before = allocated.now
            with torch.autocast("cpu", torch.bfloat16):
                hidden = backbone(tuned)(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
            hidden.sum().backward()
    said = training_memory(training).activations / GIB
    found = (allocated.peak - before) / GIB
    case = f"{'with' if checkpointing else 'without'}, dropout {dropout:g}"
    return [_short(name), case, f"{said:.2f}", f"{found:.2f}", f"{100 * (said / found - 1):+.0f} %"]


def _materialise(model: nn.Module) -> None:
    """Put tensors of the current mode in the place of those on the meta device; what trains is in float32."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                new = torch.empty(weight.shape, dtype=torch.float32 if weight.requires_grad else weight.dtype)
                trained = nn.Parameter(new, weight.requires_grad) if isinstance(weight, nn.Parameter) else new
                made[id(weight)] = weight, trained
            (module._parameters if name in module._parameters else module._buffers)[name] = made[id(weight)][1]


def _short(name: str) -> str:
    return name.removeprefix("Qwen/").removesuffix("-Instruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true")
    lines = tables()
    if parser.parse_args().trace:
        cases = [(name, True, dropout) for name in MODELS for dropout in (0.05, 0.0)] + [
            (MODELS[0], False, dropout) for dropout in (0.05, 0.0)
        ]
        head = ["model, 2 layers", "checkpointing", "formula, GiB", "torch, GiB", "gap"]
        lines = [head, *(trace(*case) for case in cases)]
    for i, cells in enumerate(lines):
        print(f"| {' | '.join(cells)} |", flush=True)
        if i == 0:
            print(f"|{'---|' * len(cells)}", flush=True)


if __name__ == "__main__":
    main()
