"""`mcit plan`: what a run will take, and what of it will not fit, as plain data."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from mcit.data_prep.errors import InputError
from mcit.eval.engines.settings import MAX_RANK
from mcit.eval.hashing import hash_model

from ..methods import Method, build_methods
from ..recipe.orders import members
from ..recipe.schema import Phase, Recipe
from ..run.disk import run_needs, trained_parameters
from ..run.start import find_start
from ..run.step import Launch
from .fit import misfits
from .memory import (
    Memory,
    Shapes,
    Training,
    engine_memory,
    host_memory,
    measure,
    meta_model,
    training_memory,
    weight_bytes,
)
from .outlook import Outlook, look_through
from .pace import Pace, assumed_training, extra_tokens, measured_answers, measured_training
from .work import Prepared, StageWork, answers, judged, prepare, stage_work


class StagePlan(TypedDict):
    """A stage, or one of its two phases. Bytes are of one training process."""

    stage: int
    name: str
    paradigm: Phase
    samples: int
    steps: int
    tokens: int
    generations: int
    memory: dict[str, int]
    memory_total: int
    host_memory: int
    seconds: float | None  # None: nothing was measured, and nothing assumed


class Plan(TypedDict):
    """`mcit plan --json`. Memory and disk in bytes."""

    name: str
    stages: list[StagePlan]
    steps: int
    tokens: int
    generations: int
    answers: int
    answers_again: int  # at most: the same questions, the answers held to a form, or without their images
    answer_tokens: int  # at most, of all of them
    judged: int  # questions to a judge, at most
    judged_tokens: int | None  # of its replies, at most; None: nobody has set a limit
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

    base, basis = recipe.base_model, defaultdict[str, list[str]](list)  # what times rest on, of which lines
    start = find_start(recipe.start_from) if recipe.start_from else None
    entering, behind = (start.entering_rank, start.stages) if start else (0, 0)
    prepared = prepare(recipe, load_processor(base))
    model = meta_model(base)
    shapes = measure(model)
    base_hash = hash_model(base.path, base.revision) if measured else ""  # else no weights are needed, nor fetched
    rows, known = [], list[Outlook]()
    for outlook in look_through(recipe, model, entering, behind):
        for phase in outlook.stage.train.phases:
            methods = build_methods(recipe.method, outlook.stage.train)
            work, counted = stage_work(recipe, outlook, phase, methods, prepared, machine.launch.processes)
            training = _training(recipe, shapes, counted, phase, work, methods, machine.launch)
            memory = training_memory(training)
            host = host_memory(training, memory, on_gpu=machine.gpu_memory is not None)
            train = outlook.stage.train
            pace = measured_training(measured, base_hash, phase, recipe.method, train.packing)
            if pace is None and machine.tflops is not None and phase == "sft":
                pace = assumed_training(shapes.parameters, machine.tflops, _checkpointing(counted, phase))
            rows.append(_row(counted, phase, work, memory, host, pace, methods))
            basis[_basis(pace, "tokens" if phase == "sft" else "completions")].append(f"stage {outlook.stage.k}")
        known.append(counted)
    asked, pace = answers(recipe, prepared), measured_answers(measured, base_hash)
    questions = judged(recipe, prepared)
    ranks = _served_ranks(recipe, known)
    # Over all parts at once: a general task trains on none.
    longest = max(tokens for lengths in prepared.lengths.values() for tokens in lengths.values())
    engine = engine_memory(recipe, shapes, max((one.width for one in known), default=0), ranks, longest)
    times = [row["seconds"] for row in rows]
    answer_seconds = round(pace.seconds(asked.answers), 1) if pace else None
    total = sum(time for time in times if time is not None) + (answer_seconds or 0.0)
    basis[_basis(pace, "answers")].append("answers")
    notes = [f"{', '.join(dict.fromkeys(lines))}: {text}" for text, lines in basis.items()]
    if recipe.sweep:
        notes.append(f"all figures are of one of the sweep's {len(list(members(recipe)))} runs")
    found = Plan(
        name=recipe.name,
        stages=rows,
        steps=sum(row["steps"] for row in rows),
        tokens=sum(row["tokens"] for row in rows),
        generations=sum(row["generations"] for row in rows),
        answers=asked.answers,
        answers_again=asked.again,
        answer_tokens=asked.tokens,
        judged=questions.questions if questions else 0,
        judged_tokens=questions.tokens if questions else 0,
        engine_memory={part: round(value) for part, value in engine._asdict().items()},
        engine_memory_total=round(engine.total),
        disk=_disk(recipe, known, prepared, shapes),
        seconds=round(total, 1) if None not in times and answer_seconds is not None else None,
        answer_seconds=answer_seconds,
        notes=[*notes, *_copies(ranks)],
        misfits=[],
    )
    found["misfits"] = misfits(found, machine.gpu_memory)
    return found


def _training(
    recipe: Recipe,
    shapes: Shapes,
    outlook: Outlook,
    phase: Phase,
    work: StageWork,
    methods: Sequence[Method],
    launch: Launch,
) -> Training:
    """A phase of a stage, as memory depends on it."""
    train, base = outlook.stage.train, recipe.base_model
    lora = train.lineage != "full" and not any(method.carries for method in methods)
    return Training(
        shapes=shapes,
        trained=trained_parameters(outlook, methods),
        width=outlook.width if lora else 0,
        whole=train.lineage == "full",
        past_rank=outlook.rank - train.lora.r if train.lineage == "stack" else 0,
        methods=sum(method.memory(outlook) for method in methods),
        dtype=base.dtype,
        quantization=base.quantization,
        mode=launch.mode,
        processes=launch.processes,
        samples=work.micro_batch,
        tokens=work.longest + work.completion,
        at_once=work.at_once,
        accumulates=work.accumulates,
        checkpointing=_checkpointing(outlook, phase),
        dropout=phase == "sft" and train.lora.dropout > 0,  # GRPO trains without
        pictures=train.picture_cache * 2**30,
    )


def _row(
    outlook: Outlook,
    phase: Phase,
    work: StageWork,
    memory: Memory,
    host: float,
    pace: Pace | None,
    methods: Sequence[Method],
) -> StagePlan:
    taken = work.tokens if outlook.stage.train.packing else work.places
    units: float = taken if phase == "sft" else work.seen
    if pace and pace.passes:
        checkpointing, filled = _checkpointing(outlook, phase), taken / work.tokens if phase == "sft" else 1.0
        more = sum(extra_tokens(method.passes(outlook), checkpointing, filled) for method in methods)
        units += more if phase == "sft" else more / (outlook.length + work.completion)
    return StagePlan(
        stage=outlook.stage.k,
        name=outlook.stage.name,
        paradigm=phase,
        samples=work.samples,
        steps=work.steps,
        tokens=work.tokens,
        generations=work.generations,
        memory={part: round(value) for part, value in memory._asdict().items()},
        memory_total=round(memory.total),
        host_memory=round(host),
        seconds=round(pace.seconds(units, outlook.processes), 1) if pace else None,
    )


def _checkpointing(outlook: Outlook, phase: Phase) -> bool:
    return bool(outlook.stage.train.args(phase).get("gradient_checkpointing", True))  # TRL's default


def _disk(recipe: Recipe, known: Sequence[Outlook], prepared: Prepared, shapes: Shapes) -> dict[str, int]:
    needs = run_needs(recipe, known)
    return {
        "stages": needs.kept,
        "checkpoints": needs.work,  # gone when the stage is done
        "data": prepared.bytes,
        "base_model": round(weight_bytes(shapes, recipe.base_model.dtype)),
    }


def _served_ranks(recipe: Recipe, known: Sequence[Outlook]) -> list[int]:
    """The ranks of the adapters that are served, stage after stage; none of those that are models of their own."""
    return [
        one.rank
        for one in known
        if one.stage.train.lineage != "full"
        and not any(method.carries for method in build_methods(recipe.method, one.stage.train))
    ]


def _copies(ranks: Sequence[int]) -> Iterator[str]:
    if large := sum(rank > MAX_RANK for rank in ranks):
        yield (
            f"{large} policies have ranks above {MAX_RANK} (up to {max(ranks)}), which vLLM serves as merged copies, "
            "each with an engine of its own: lower train.lora.r, or set train.lineage: continue"
        )


def _basis(pace: Pace | None, units: str) -> str:
    if pace is None:
        how = (
            "Train a stage with prepare.limit.train=64 and plan again, or name runs with the same base: --measured RUN"
        )
        return f"time not known. {how}"
    if not pace.measured:
        return "time assumed from the peak of the GPU, at the share of it that an H100 was seen to reach"
    each = f"{1000 * pace.each:.3g} ms each of the {units}, {pace.start:.1f} s to start"
    return f"time by {pace.measured} that were measured: {each}"


def known_runs(named: Sequence[Path]) -> list[Path]:
    """The runs to measure by: those named, or all in `runs/`. Raises `InputError` for a name that is no run."""
    for run in named:
        if not (run / "recipe.yaml").is_file():
            raise InputError("is no run", where=run, field="--measured", remedy="Name the folder of a run")
    return list(named) or sorted(marker.parent for marker in Path("runs").glob("**/recipe.yaml"))
