"""What of a run is published: of each stage its policy and method state, and over all of them card and results."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.lora import hash_adapter
from mcit.eval.results import Results, read_results
from mcit.eval.serving import Serving, read_serving

from ..recipe.schema import Recipe, Stage
from ..recipe.text import to_yaml
from ..run.start import CARRIED, EXTENDED, MANIFEST, stages_behind
from .card import model_card, predictions_card
from .config import PublishConfig
from .private import Content, Private, Tree

SCHEMA_VERSION = 1
# Where files of a model name the folder that they were made from.
_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Revision:
    """A stage as it is published: a commit with a tag, whose tree holds the stage's own files beside the card."""

    k: int
    name: str
    tag: str
    serving: Serving
    base: dict[str, Any]  # the base model as others know it
    tree: Tree


@dataclass(frozen=True)
class Publication:
    """Everything that is published of a run."""

    repo_id: str
    private: bool
    card: Tree
    revisions: list[Revision]
    predictions: Tree = field(default_factory=dict)  # of the dataset <repo_id>-predictions; none: there is none

    def trees(self) -> Iterator[tuple[str, Tree]]:
        """What each folder of a dry run holds: a model's revision by its tag, `main`, and the dataset's."""
        for revision in self.revisions:
            yield revision.tag, {**self.card, **revision.tree}
        yield "main", {**self.card, **self.revisions[-1].tree}
        if self.predictions:
            yield "predictions", self.predictions


def gather(recipe: Recipe, run_dir: Path, config: PublishConfig) -> Publication:
    """Everything that is to be published of a run with results, looked through for what is private.

    Raises `InputError`, also where the stages are no longer those that the results are of.
    """
    private, results = Private(recipe, run_dir, config), read_results(run_dir)
    for task in config.datasets:
        if task not in results["learned"]:
            problem, remedy = f"there is no task {task}", f"Tasks: {', '.join(results['learned'])}"
            raise InputError(problem, where=recipe.name, field="publish.datasets", remedy=remedy)
    revisions = [_revision(recipe, run_dir, stage, results, config, private) for stage in _trained(recipe, run_dir)]
    if not revisions:
        raise InputError("no stage is trained", where=run_dir, remedy="Train first: `mcit run`")
    shown: Results = private.without(results)
    card = {
        "README.md": model_card(recipe, shown, revisions, config).encode(),
        "matrix.png": _report_file(run_dir, "matrix.png"),
        "results.json": _json(shown),
        "recipe.yaml": to_yaml(_recipe(recipe, config, private)).encode(),
        **_eval_results(shown, config),
    }
    predictions = _predictions(run_dir, shown, config) if config.predictions else {}
    publication = Publication(config.repo_id, config.private, card, revisions, predictions)
    for _, tree in publication.trees():
        private.check(tree)
    return publication


def write_trees(publication: Publication, folder: Path) -> None:
    """Write what would be published below `folder`, which must be new or empty, and send nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("is not empty", where=folder, field="--dry-run", remedy="Name a new folder")
    for name, tree in publication.trees():
        for path, content in tree.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)


def _trained(recipe: Recipe, run_dir: Path) -> Iterator[Stage]:
    """The stages 1…k that are done."""
    for stage in recipe.stages:
        if not (run_dir / "stages" / stage.folder / "done.json").exists():
            return
        yield stage


def _revision(
    recipe: Recipe, run_dir: Path, stage: Stage, results: Results, config: PublishConfig, private: Private
) -> Revision:
    folder = run_dir / "stages" / stage.folder
    serving = read_serving(folder)
    hashes = results["hashes"]["policies"]
    if stage.k >= len(hashes) or hashes[stage.k] != serving.hash:
        remedy = f"First: `mcit eval {run_dir}`"
        raise InputError("results.json is of another policy", where=folder, field="hash", remedy=remedy)
    base = {
        "model": _base(recipe, config),
        "revision": serving.revision,
        "hash": serving.base_hash,
        "dtype": serving.dtype,
        "processor": serving.processor,
    }
    tree: dict[str, Content] = {}
    assert serving.path is not None
    # A LoRA and a whole model lie where their libraries look for them.
    places = {EXTENDED if serving.kind == "extended" else "": serving.path, "method": "method"}
    if serving.carried:
        places[CARRIED] = serving.carried
    for place, name in places.items():
        for file in _files_in(folder / name, run_dir) if (folder / name).exists() else []:
            tree[f"{place}/{file.name}".lstrip("/")] = _model_json(file, base) if file.suffix == ".json" else file
    state = sorted(name for name in tree if name.startswith("method/"))
    learned = {task: first for task, first in recipe.learned.items() if first <= stage.k}
    tree[MANIFEST] = _json(
        {
            "schema_version": SCHEMA_VERSION,
            "run": recipe.name,
            "seed": recipe.seed,
            "stage": stage.k,
            "behind": stages_behind(run_dir / "stages" / "00-base"),
            "name": stage.name,
            "learned": learned,
            "kind": serving.kind,
            "rank": serving.rank,
            "hash": serving.hash,
            **({"carried": hash_adapter(folder / serving.carried)} if serving.carried else {}),
            "base": base,
            "lineage": stage.train.lineage,
            "paradigm": stage.train.paradigm,
            "method": private.without(recipe.method),
            "state": state,
        }
    )
    return Revision(stage.k, stage.name, tag_of(stage), serving, base, tree)


def tag_of(stage: Stage) -> str:
    """The tag of a stage: `stage-03-gqa`; what a tag may not hold becomes a dash."""
    return "stage-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", stage.folder)


def _files_in(folder: Path, run_dir: Path) -> list[Path]:
    """The files of a policy or a state. Raises `InputError` for what leads out of the run, and for folders."""
    found = sorted(folder.iterdir())
    for file in found:
        if not file.resolve().is_relative_to(run_dir.resolve()):
            raise InputError("leads out of the run, and is not published", where=file)
        if file.is_dir():
            raise InputError("is a folder, and policies have none", where=file)
    return found


def _model_json(file: Path, base: dict[str, Any]) -> Content:
    """A configuration that names its base as the Hub does, or not at all; others as they are."""
    content = read_json(file)
    named = [key for key in _NAMES if isinstance(content, dict) and key in content]
    if not named:
        return file
    content |= dict.fromkeys(named, base["model"])
    if "revision" in content:
        content["revision"] = base["revision"]
    return _json(content)


def _base(recipe: Recipe, config: PublishConfig) -> str | None:
    """The base model's name on the Hub, as far as it is known."""
    path = recipe.base_model.path
    return config.base_model or (None if Path(path).is_absolute() else path)


def _recipe(recipe: Recipe, config: PublishConfig, private: Private) -> dict[str, Any]:
    """The recipe without data, hosts and paths: how the run was trained and scored, not on what files."""
    kept = ("name", "style", "reasoning", "scorer", "reward", "format", "overrides")
    tasks = {task.name: task.model_dump(include=set(kept), exclude_none=True) for task in recipe.tasks}
    stream: list[Any] = []
    for stage in recipe.stages:
        entry = [tasks.pop(name, name) for name in stage.tasks]
        stream.append(entry if len(entry) > 1 else entry[0])
    whole = recipe.model_dump(mode="json")
    base = whole["base_model"] | {"path": _base(recipe, config)}
    sections = {key: whole[key] for key in ("seed", "blur", "prepare", "method", "train", "eval")}
    return private.without({"name": recipe.name, "base_model": base, "stream": stream, **sections})


def _eval_results(results: Results, config: PublishConfig) -> dict[str, Content]:
    """`.eval_results/<task>.yaml`, the Hub's format, for the tasks whose dataset may be named: after the last stage."""
    last = results["matrix"][-1]
    found: dict[str, Content] = {}
    for column, task in enumerate(results["tasks"]):
        score, dataset = last[column], config.datasets.get(task["name"])
        if score is not None and dataset is not None:
            note = f"{task['scorer']}, {task['n']} samples, after the last of {len(results['stages']) - 1} stages"
            entry = EvalResultEntry(dataset, task["name"], round(score, 4), notes=note)
            found[f".eval_results/{task['name']}.yaml"] = yaml.safe_dump(
                eval_result_entries_to_yaml([entry]), sort_keys=False
            ).encode()
    return found


def _predictions(run_dir: Path, results: Results, config: PublishConfig) -> Tree:
    """The companion dataset: a configuration for each task, in it a split for each stage that was asked."""
    tree: dict[str, Content] = {}
    for task in results["tasks"]:
        for stage in results["stages"]:
            file = run_dir / "predictions" / f"{stage['k']:02d}" / f"{task['name']}.jsonl"
            if results["matrix"][stage["k"]][results["tasks"].index(task)] is not None:
                rows = read_jsonl(file)
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                tree[f"data/{task['name']}/stage_{stage['k']:02d}.jsonl"] = "".join(lines).encode()
    return {"README.md": predictions_card(results, sorted(tree), config).encode(), **tree}


def _report_file(run_dir: Path, name: str) -> Path:
    path = run_dir / "report" / name
    if not path.is_file():
        raise InputError("no such file", where=path, remedy=f"First: `mcit report {run_dir}`")
    return path


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n").encode()
