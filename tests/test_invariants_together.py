"""What holds for every method when processes train together: data parallel, ZeRO-2 and ZeRO-3.

Each method that acts while a stage trains is run in every mode that it declares, in its `home` (`two_stages.py`); the
others, which train as an empty `method:` does, in the last of theirs. Under lineage `full`, which ZeRO-3 does not have,
each method that has it is run in one mode. `make test` takes one case.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from together import train_together
from two_stages import STAGES, Stages, Trained, acts, assert_same_stage, home, keys, section

from mcit.data_prep.files import read_json
from mcit.pipeline.methods import METHODS


def modes(name: str, lineage: str) -> list[str]:
    """Of several processes."""
    allowed = {"single", "zero3"} if lineage == "full" else {"single"}
    return [mode for mode in METHODS[name].distributed if mode not in allowed]


QUICK = ("reglora", "stack", "zero3")
CASES = [
    (name, lineage, mode)
    for name in METHODS
    for lineage in (home(name), "full")
    if lineage in METHODS[name].lineages
    for mode in (modes(name, lineage) if acts(name) and lineage != "full" else modes(name, lineage)[-1:])
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp)


@pytest.mark.parametrize(
    ("name", "lineage", "mode"),
    [pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow) for case in CASES],
)
def test_two_processes_are_one(train: Stages, tmp_path: Path, name: str, lineage: str, mode: str) -> None:
    """2 processes × 4 samples × 2 micro-batches, under checkpointing, against 1 × 16 × 1."""
    first, alone = train(section(name), lineage, "sft")
    more = (f"train.sft.args.{setting}" for setting in ("per_device_train_batch_size=4", "gradient_checkpointing=true"))
    together = in_two_processes(train, first, tmp_path, name, lineage, "sft", mode, *more)
    assert_same_stage(alone.folder, together)
    for method, state in alone.states.items():
        if state:
            loaded = load_file(together / "method" / f"{method}.safetensors")
            assert loaded.keys() == state.keys()
            close = {key: torch.isclose(loaded[key].float(), value.float(), 1e-3, 1e-5) for key, value in state.items()}
            equal = [mask.float().mean().item() for mask in close.values()]
            assert min(equal) > 0.99  # what a threshold decides may swap


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if "rft" in METHODS[name].paradigms and acts(name)])
def test_rollouts_train_alike_in_every_mode(train: Stages, tmp_path: Path, name: str) -> None:
    """What two processes draw is not what one draws, but the same in every mode."""
    lineage = home(name)
    first = train.first(section(name), lineage)
    folders = [
        in_two_processes(train, first, tmp_path / mode, name, lineage, "rft", mode) for mode in modes(name, lineage)
    ]
    for folder in folders[1:]:
        assert_same_stage(folders[0], folder)


def in_two_processes(
    train: Stages, first: Trained, run: Path, name: str, lineage: str, paradigm: str, mode: str, *overrides: str
) -> Path:
    """Stage 2 after `first`; its folder."""
    train.after(first, run)
    resolved = keys(section(name), lineage, paradigm)
    train_together(run, train.recipe, mode, 2, *resolved, *overrides, script=paradigm)
    summary = read_json(run / "stages" / STAGES[1] / "trained.json")
    assert (summary["processes"], summary["mode"]) == (2, mode)  # the trainer itself asserts a DeepSpeedEngine
    return run / "stages" / STAGES[1]
