"""RegLoRA's penalty against its official form: time and memory at the shapes of a language model's linear layers.

    python benchmarks/reglora.py OUT.json [--shapes 0.5b 7b] [--tasks 1 8]

One decoder layer, LoRA of rank 128, 2 % keys a task, float32. The official form, written from a description of SEFE's
code: B A of each linear layer, dense; the values at the keys of all past tasks, found by pairs of 64-bit indices, and
the mean of their absolutes; in every micro-batch, within the layer that gradient checkpointing runs twice. Ours is
evaluated once an optimizer step. Each runs in a process of its own with one thread; times are CPU seconds, so that
other work on the machine hardly counts. A step is SEFE's: 128 samples in micro-batches of 16, here of 600 tokens; what
tokens cost is measured on the layer's linear layers alone. Memory is that of the whole model: the state of all decoder
layers, and what one evaluation takes beside it, which is free again when the next layer's begins.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import Figure, figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mcit.data_prep.files import write_json
from mcit.pipeline.methods.keys import MeanAtKeys, add_keys, pack, total, unpack

# (out, in), as published: Qwen/Qwen2.5-0.5B and liuhaotian/llava-v1.5-7b, config.json.
SHAPES = {
    "0.5b": {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896)}
    | {"gate": (4864, 896), "up": (4864, 896), "down": (896, 4864)},
    "7b": dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)},
}
LAYERS = {"0.5b": 24, "7b": 32}
RANK, FRACTION = 128, 0.02  # SEFE (code)
MICRO_BATCHES, TOKENS = 8, 128 * 600  # of a step
FORMS = {"official": None, "union": 1, "multiset": 4}  # bits of a count
REPEATS = 5

Factors = dict[str, tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own: a form of a shape
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        form, shape = options.one.split()
        print(json.dumps(measured(form, shape, options.out)))
        return
    rows = []
    for shape in options.shapes:
        token = seconds_a_token(shape)
        for tasks in options.tasks:
            with tempfile.TemporaryDirectory() as folder:
                selecting = write_states(shape, tasks, Path(folder))
                for form in FORMS:
                    command = [sys.executable, __file__, str(Path(folder) / f"{form}.safetensors"), "--one"]
                    done = subprocess.run([*command, f"{form} {shape}"], check=True, stdout=subprocess.PIPE)
                    rows.append({"shape": shape, "tasks": tasks, "form": form, **json.loads(done.stdout)})
                    step = rows[-1]["seconds"] * times_a_step(form)
                    rows[-1] |= {"a_step": step, "share": step / (step + TOKENS * token)}
            rows[-1]["selecting"] = selecting
    write_json(options.out, {"torch": torch.__version__, "rows": rows, "figures": [*compared(rows)]})
    print(table(rows))


def times_a_step(form: str) -> int:
    """How often a form is evaluated in a step."""
    return MICRO_BATCHES if form == "official" else 1


def compared(rows: list[dict]) -> Iterator[Figure]:
    """Ours against the official form, a step each."""
    for row in rows:
        if row["form"] == "official":
            theirs = [one * times_a_step("official") for one in row["runs"]]
        else:
            name = f"RegLoRA's penalty ({row['form']}), {row['shape']}, {row['tasks']} past tasks"
            yield figure(name, "the official form", row["runs"], theirs, target=5.0)


def factors(shape: str, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(RANK, columns, generator=generator), torch.randn(out, RANK, generator=generator))
        for name, (out, columns) in SHAPES[shape].items()
    }


def write_states(shape: str, tasks: int, folder: Path) -> float:
    """Each form's state after `tasks` tasks, `<form>.safetensors`; the seconds that finding a task's keys took."""
    indices, counts = dict[str, Tensor](), dict[str, Tensor]()
    seconds = 0.0
    for task in range(tasks):
        for name, (a, b) in factors(shape, task).items():
            start = time.process_time()
            packed = add_keys(None, a, b, FRACTION, 1)
            seconds += (time.process_time() - start) / tasks
            keys = unpack(packed, 1, a.shape[1])
            found = keys.nonzero().contiguous()
            counts[name] = counts[name] + keys if task else keys
            indices[name] = torch.cat([found, indices[name]]) if task else found
    save_file(indices, folder / "official.safetensors")
    for form, bits in FORMS.items():
        if bits:
            packed = {name: pack(count.clamp(max=2**bits - 1), bits) for name, count in counts.items()}
            save_file(packed, folder / f"{form}.safetensors")
    return seconds


def official(layers: Factors, indices: dict[str, Tensor]) -> Tensor:
    """Mean over layers of the mean of |B A| at the indices, under gradient checkpointing."""

    def penalty() -> Tensor:
        terms = [(b @ a)[tuple(indices[name].unbind(1))].abs().mean() for name, (a, b) in layers.items()]
        return torch.stack(terms).mean()

    return checkpoint(penalty, use_reentrant=False)


def ours(layers: Factors, packed: dict[str, Tensor], totals: dict[str, int], bits: int) -> Tensor:
    return sum(MeanAtKeys.apply(*layers[n], packed[n], bits, totals[n]) for n in layers) / len(layers)


def measured(form: str, shape: str, file: Path) -> dict[str, Any]:
    """Seconds and bytes of one evaluation, backward included, and the state's bytes."""
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    layers = factors(shape, seed=100)
    for factor in (factor for pair in layers.values() for factor in pair):
        factor.requires_grad_()
        factor.grad = torch.zeros_like(factor)  # training has it whatever the form
    bits = FORMS[form]
    totals = {name: total(packed, bits) for name, packed in state.items()} if bits else {}

    def evaluate() -> Tensor:
        term = ours(layers, state, totals, bits) if bits else official(layers, state)
        term.backward()
        return term

    (torch.ones(64, 64, requires_grad=True) @ torch.ones(64, 64)).sum().backward()  # threads and libraries
    before = resident()
    value = evaluate().item()
    work, runs = peak() - before, timed(evaluate)
    return {
        "value": value,
        "seconds": median(runs),
        "runs": runs,
        "state_bytes": sum(tensor.nbytes for tensor in state.values()),
        "work_bytes": work,
    }


def seconds_a_token(shape: str, tokens: int = 256) -> float:
    """What the layer's linear layers cost, frozen, with LoRA on each and gradient checkpointing."""
    layers = factors(shape, seed=200)
    weights = {name: torch.randn(SHAPES[shape][name]) for name in layers}
    inputs = {columns: torch.randn(tokens, columns, requires_grad=True) for _, columns in SHAPES[shape].values()}

    def forward() -> Tensor:
        outputs = [
            (inputs[a.shape[1]] @ weights[name].T + inputs[a.shape[1]] @ a.T @ b.T).sum()
            for name, (a, b) in layers.items()
        ]
        return torch.stack(outputs).sum()

    for factor in (factor for pair in layers.values() for factor in pair):
        factor.requires_grad_()
    return median(timed(lambda: checkpoint(forward, use_reentrant=False).backward())) / tokens


def timed(work: Callable[[], object]) -> list[float]:
    """A few runs, in CPU seconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return seconds


def resident() -> int:
    """Bytes in memory now, from where `peak` counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes in memory since `resident`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def table(rows: list[dict]) -> str:
    heads = ["shape", "past tasks", "form", "s, once", "s, a step", "of a step", "state, MB", "work, MB"]
    heads += ["less time, once", "less time, a step", "less memory, state", "less memory"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        base = next(r for r in rows if (r["shape"], r["tasks"], r["form"]) == (row["shape"], row["tasks"], "official"))
        state, work = ([r[f"{kind}_bytes"] for r in (base, row)] for kind in ("state", "work"))
        state = [LAYERS[row["shape"]] * one for one in state]
        cells = [row["shape"], row["tasks"], row["form"], f"{row['seconds']:.3f}", f"{row['a_step']:.2f}"]
        cells += [f"{row['share']:.1%}", f"{state[1] / 1e6:.0f}", f"{work[1] / 1e6:.0f}"]
        less = [base["seconds"] / row["seconds"], base["a_step"] / row["a_step"]]
        less += [state[0] / state[1], (state[0] + work[0]) / (state[1] + work[1])]
        cells += [f"{ratio:.1f} ×" for ratio in less]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
