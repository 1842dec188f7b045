"""`mcit plan`: what a run will take, and what of it will not fit, as plain data."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from mcit.data_prep.errors import InputError
from mcit.eval.hashing import hash_model

from ..recipe.orders import members
from ..recipe.schema import Recipe
from ..run.start import find_start
from ..run.step import Launch
from .memory import disk, engine_memory, policy_ranks, shapes_of, training_memory, weight_bytes
from .pace import Pace, assumed_training, measured_answers, measured_training
from .work import answers, prepare, stage_work

_GIB = 2**30
_LARGEST_RANK = 512  # that vLLM 0.31 takes
_RESERVE = 0.9  # of a GPU's memory: what vLLM takes by default, and what training can count on


class StagePlan(TypedDict):
    """A stage. Bytes are of one training process."""

    stage: int
    name: str
    paradigm: str
    samples: int
    steps: int
    tokens: int
    generations: int
    memory: dict[str, int]
    memory_total: int
    seconds: float | None  # None: nothing was measured, and nothing assumed


class Plan(TypedDict):
    """`mcit plan --json`. Memory and disk in bytes."""

    name: str
    stages: list[StagePlan]
    steps: int
    tokens: int
    generations: int
    answers: int
    answer_tokens: int
    engine_memory: dict[str, int]
    engine_memory_total: int
    disk: dict[str, int]
    seconds: float | None
    answer_seconds: float | None
    notes: list[str]  # what the figures rest on
    misfits: list[str]  # what will not fit


class Machine(NamedTuple):
    """What the run is planned for."""

    launch: Launch
    gpu_memory: float | None  # GiB of one GPU; None: not known, and nothing is said of it
    tflops: float | None  # the peak of one GPU in the base's dtype; None: time only as it was measured


def plan(recipe: Recipe, machine: Machine, measured: Sequence[Path]) -> Plan:
    """Plan a run; its data are prepared on the way, in the cache. `measured` are earlier runs. Raises `InputError`."""
    from ..stage.entering import load_processor  # here: needs trl

    processes, mode = machine.launch.processes, machine.launch.config.stem
    base, notes = recipe.base_model, list[str]()
    start = find_start(recipe.start_from) if recipe.start_from else None
    behind, past_rank = (start.stages, start.rank or 0) if start else (0, 0)
    prepared = prepare(recipe, load_processor(base))
    shapes = shapes_of(base, recipe.stages[0].train.modules)
    base_hash = hash_model(base.path, base.revision)
    rows = []
    for stage in recipe.stages:
        work = stage_work(recipe, stage, prepared, processes, behind)
        memory = training_memory(recipe, stage.k, shapes, work, processes, mode, past_rank)
        pace = measured_training(measured, base_hash, stage.train.paradigm)
        if pace is None and machine.tflops is not None and stage.train.paradigm == "sft":
            checkpointing = stage.train.sft.args.get("gradient_checkpointing", True)
            pace = assumed_training(shapes.parameters, machine.tflops * processes, checkpointing)
        notes.append(f"stage {stage.k}: {_basis(pace, 'tokens' if stage.train.paradigm == 'sft' else 'completions')}")
        units = work.tokens if stage.train.paradigm == "sft" else work.seen
        rows.append(
            StagePlan(
                stage=stage.k,
                name=stage.name,
                paradigm=stage.train.paradigm,
                samples=work.samples,
                steps=work.steps,
                tokens=work.tokens,
                generations=work.generations,
                memory={part: round(value) for part, value in memory._asdict().items()},
                memory_total=round(memory.total),
                seconds=round(pace.seconds(units), 1) if pace else None,
            )
        )
    asked, pace = answers(recipe, prepared), measured_answers(measured, base_hash)
    longest = max(max(lengths.values()) for lengths in prepared.lengths.values())
    ranks = policy_ranks(recipe, past_rank)
    engine = engine_memory(recipe, shapes, ranks, longest)
    times = [row["seconds"] for row in rows]
    answer_seconds = round(pace.seconds(asked.answers), 1) if pace else None
    total = sum(time for time in times if time is not None) + (answer_seconds or 0.0)
    notes.append(f"answers: {_basis(pace, 'answers')}")
    if recipe.sweep:
        notes.append(f"all figures are of one of the sweep's {len(list(members(recipe)))} runs")
    if recipe.method:
        notes.append(f"memory and disk of {', '.join(recipe.method)} come on top: docs/methods.md")
    space = {
        "adapters": disk(recipe, shapes, past_rank),
        "data": prepared.bytes,
        "base_model": round(weight_bytes(shapes, base.model_copy(update={"quantization": "none"}))),
    }
    found = Plan(
        name=recipe.name,
        stages=rows,
        steps=sum(row["steps"] for row in rows),
        tokens=sum(row["tokens"] for row in rows),
        generations=sum(row["generations"] for row in rows),
        answers=asked.answers,
        answer_tokens=asked.tokens,
        engine_memory={part: round(value) for part, value in engine._asdict().items()},
        engine_memory_total=round(engine.total),
        disk=space,
        seconds=round(total, 1) if None not in times and answer_seconds is not None else None,
        answer_seconds=answer_seconds,
        notes=list(dict.fromkeys(notes)),
        misfits=[],
    )
    found["misfits"] = _misfits(found, machine, ranks)
    return found


def _basis(pace: Pace | None, units: str) -> str:
    if pace is None:
        return "time not known. Name runs with the same base that were measured: --measured RUN"
    if not pace.measured:
        return "time assumed from the peak of the GPU, at the share of it that an H100 was seen to reach"
    each = f"{1000 * pace.each:.3g} ms each of the {units}, {pace.start:.1f} s to start"
    return f"time by {pace.measured} that were measured: {each}"


def _misfits(found: Plan, machine: Machine, ranks: Sequence[int]) -> list[str]:
    """What will not fit, each with what to do about it."""
    problems = []
    if machine.gpu_memory is not None:
        room = machine.gpu_memory * _GIB * _RESERVE
        for row in found["stages"]:
            if row["memory_total"] > room:
                problems.append(
                    f"stage {row['stage']} trains in {row['memory_total'] / _GIB:.1f} GiB, and {room / _GIB:.1f} of "
                    f"{machine.gpu_memory:g} can be counted on: lower train.{row['paradigm']}.args."
                    "per_device_train_batch_size or base_model.processor.max_pixels, or set base_model.quantization: "
                    "nf4"
                )
        if found["engine_memory_total"] > room:
            problems.append(
                f"vLLM needs {found['engine_memory_total'] / _GIB:.1f} GiB, and takes {room / _GIB:.1f} of "
                f"{machine.gpu_memory:g}: lower eval.max_model_len"
            )
    if max(ranks) > _LARGEST_RANK:
        first = next(k for k, rank in enumerate(ranks, 1) if rank > _LARGEST_RANK)
        problems.append(
            f"from stage {first} on policies have ranks above {_LARGEST_RANK} (up to {max(ranks)}), which vLLM does "
            "not serve: lower train.lora.r, or set train.lineage: continue or eval.engine: transformers"
        )
    here = next(parent for parent in Path("runs").absolute().parents if parent.exists())
    needed, free = found["disk"]["adapters"], shutil.disk_usage(here).free
    if needed > free:
        problems.append(f"the adapters need {needed / _GIB:.1f} GiB on disk, and {here} has {free / _GIB:.1f} free")
    return problems


def known_runs(named: Sequence[Path]) -> list[Path]:
    """The runs to measure by: those named, or all in `runs/`. Raises `InputError` for a name that is no run."""
    for run in named:
        if not (run / "recipe.yaml").is_file():
            raise InputError("is no run", where=run, field="--measured", remedy="Name the folder of a run")
    return list(named) or sorted(marker.parent for marker in Path("runs").glob("**/recipe.yaml"))
