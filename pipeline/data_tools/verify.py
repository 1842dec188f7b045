"""`mcit verify`: from recipes and data files to everything that is wrong with them."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mcit.data_prep.cache import temporary_folder
from mcit.data_prep.checks import TokenCounter
from mcit.data_prep.errors import InputError
from mcit.data_prep.forms import final_answer
from mcit.data_prep.places import settle
from mcit.data_prep.readers import Part
from mcit.data_prep.schema import Sample, TaskConfig
from mcit.data_prep.verify.check import Checks, Numbered, check
from mcit.data_prep.verify.pictures import Pictures
from mcit.data_prep.verify.problems import Findings
from mcit.data_prep.verify.scan import Scan
from mcit.data_prep.verify.twins import Overlap, find_leaks, find_twins
from mcit.eval.hashing import cache_dir, hub_commit
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import score_gold
from mcit.eval.serving import Serving

from ..recipe.loading import load_recipe
from ..recipe.schema import ModelConfig, Recipe

Show = Callable[[str], None]
_DATA = (".json", ".jsonl", ".parquet")


class Wanted(NamedTuple):
    """A task to verify: which of its sources (None: all), what they are relative to, and what has to fit."""

    task: TaskConfig
    sources: dict[Part, str] | None
    base_dir: Path
    model: ModelConfig | None
    max_length: int | None  # tokens in training
    max_model_len: int | None  # tokens in evaluation
    taught: bool = True  # whether the training answers are, in some stage


@dataclass
class Verified:
    """All that was read and found. `notes` are for the reader, and speak against nothing."""

    scans: list[Scan]
    pictures: Pictures
    findings: Findings
    recipes: list[Recipe]
    overlaps: list[Overlap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def verify(
    data: Sequence[str],
    *,
    images: Path | None = None,
    tests: Sequence[str] = (),
    model: str | None = None,
    max_length: int | None = None,
    show: Show = lambda line: None,
) -> Iterator[Verified]:
    """Read and check everything that `data` names: recipes (with `key=value` overrides among them) and data files.

    For data files, `images` is the folder of their images, `tests` are files that none of them may give away, and
    `model` counts tokens. What was read is on disk until the context ends. Raises `InputError` for a bad recipe.
    """
    wanted, recipes = _wanted(data, images, tests, model, max_length)
    pictures, findings = Pictures(), Findings()
    cache = cache_dir().resolve()
    with temporary_folder(cache) as folder:
        verified = Verified([], pictures, findings, recipes)
        limited = []
        for one in wanted:
            try:
                task, number = settle(one.task, one.base_dir, cache), len(verified.scans)
                scan = Scan(
                    number,
                    task,
                    one.sources,
                    base_dir=one.base_dir,
                    folder=folder / str(number),
                    pictures=pictures,
                    findings=findings,
                )
            except InputError as error:  # a Hub dataset that is not there, an archive that is none
                findings.add("file", error, task=one.task.name, part="train")
                continue
            verified.scans.append(scan)
            limited.append(one)
            scan.read(show)
        pictures.look(show)
        counters = _Counters(pictures, verified.notes)
        for scan, one in zip(verified.scans, limited, strict=True):
            if scan.lacks_test:
                scan.split_off()
            counter, context = counters.of(one.model)
            train, held_out = (_least(limit, context) for limit in (one.max_length, one.max_model_len))
            limits: dict[Part, int | None] = {"train": train, "validation": held_out, "test": held_out}
            check(scan, Checks(counter, limits, one.taught, _why_wrong), show)
            find_twins(scan, pictures)
            verified.notes += [f"{scan.name}: {note}" for note in scan.reader.notes]
        show("looking for leaks")
        verified.overlaps = find_leaks(verified.scans, pictures)
        yield verified


def _wanted(
    data: Sequence[str], images: Path | None, tests: Sequence[str], model: str | None, max_length: int | None
) -> tuple[list[Wanted], list[Recipe]]:
    """The tasks that the arguments name, each with a name of its own, and the recipes among the arguments."""
    overrides = [entry for entry in data if "=" in entry and not Path(entry).exists()]
    named = [entry for entry in data if entry not in overrides]
    base = ModelConfig(path=model) if model else None
    wanted: list[Wanted] = []
    recipes: list[Recipe] = []
    for entry in named:
        if Path(entry).suffix in _DATA:
            wanted.append(_file(entry, "train", images, base, max_length))
        else:
            recipe = load_recipe(entry, overrides, check_methods=False)
            recipes.append(recipe)
            wanted += _tasks(recipe)
    wanted += [_file(entry, "test", images, base, max_length) for entry in tests]
    if not wanted:
        raise InputError("names no recipe and no data file", where="mcit verify")
    if overrides and not recipes:
        raise InputError("changes a recipe, and none is named", where="mcit verify", field=overrides[0])
    if (images or model or max_length) and all(one.sources is None for one in wanted):
        problem = "--images, --model and --max-length are for data files: a recipe says these itself"
        raise InputError(problem, where="mcit verify")
    return _with_names(wanted), recipes


def _file(source: str, part: Part, images: Path | None, model: ModelConfig | None, limit: int | None) -> Wanted:
    name = re.sub(r"[^\w.-]|^[^A-Za-z0-9]", "-", Path(source).stem, flags=re.ASCII).lstrip("-") or "data"
    path = str(Path(source).absolute())
    task = TaskConfig(name=name, train=path, images=str(images.absolute()) if images else None)
    return Wanted(task, {part: path}, Path.cwd(), model, limit, limit)


def _tasks(recipe: Recipe) -> list[Wanted]:
    wanted = []
    by_answers = [stage for stage in recipe.stages if "sft" in stage.train.phases]
    taught = {name for stage in by_answers for name in (*stage.tasks, *stage.visitors)}
    taught |= {anchor.name for anchor in recipe.anchors}
    for task in recipe.sources:
        if task.scorer:
            get_scorer(task.scorer)  # refuses what is none before anything is read
        limits = recipe.max_length(task.name), recipe.eval.max_model_len
        wanted.append(Wanted(task, None, Path(recipe.folder), recipe.base_model, *limits, task.name in taught))
    return wanted


def _with_names(wanted: list[Wanted]) -> list[Wanted]:
    """What several recipes share once; what else has the name of another gets a number behind it."""
    found: list[Wanted] = []
    names = set[str]()
    for one in wanted:
        if one in found:
            continue
        name, number = one.task.name, 1
        while name in names:
            number += 1
            name = f"{one.task.name}-{number}"
        names.add(name)
        found.append(one._replace(task=one.task.model_copy(update={"name": name})))
    return found


class _Counters:
    """One counter of tokens a model; where a model cannot be had, a note says so and tokens are not counted."""

    def __init__(self, pictures: Pictures, notes: list[str]):
        self.facts, self.pictures, self.notes = Numbered(pictures), pictures, notes
        self.known: list[tuple[ModelConfig, tuple[TokenCounter | None, int | None]]] = []

    def of(self, model: ModelConfig | None) -> tuple[TokenCounter | None, int | None]:
        """The counter of a model, and the length of its context in tokens."""
        if model is None:
            return None, None
        for known, found in self.known:
            if known == model:
                return found
        try:
            found = self._load(model)
        except (InputError, OSError, ValueError) as error:
            self.notes.append(f"tokens are not counted: {' '.join(str(error).split())[:300]}")
            found = None, None
        self.known.append((model, found))
        return found

    def _load(self, model: ModelConfig) -> tuple[TokenCounter, int]:
        from transformers import AutoConfig  # here: takes seconds

        from mcit.eval.engines.base import load_processor

        if not Path(model.path).is_dir():
            hub_commit(model.path, model.revision)
        settings = model.model_dump(exclude={"path", "quantization"})
        row0 = Serving(stage=0, name="base", kind="base", base=model.path, base_hash="", hash="", **settings)
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        counter = TokenCounter(load_processor(row0), self.facts, lambda name: Path(self.pictures.paths[int(name)]))
        return counter, int(config.get_text_config().max_position_embeddings)


def _least(limit: int | None, context: int | None) -> int | None:
    return min((value for value in (limit, context) if value is not None), default=None)


def _why_wrong(sample: Sample, scorer: str) -> str | None:
    """Why the gold answer would not be scored as right."""
    try:
        verdict = score_gold(sample, get_scorer(scorer))["verdict"]
    except InputError as error:
        return str(error)
    answer = final_answer(sample["completion"])
    return None if verdict == "correct" else f"the gold answer {answer[:60]!r} is {verdict} for the scorer {scorer}"
