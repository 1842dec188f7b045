"""`start_from:` a run, a stage of one, or a published stage: the stream goes on from there, method state included.

What the first stage enters with is copied into `stages/00-base/`, in the place of the untouched base: row 0 of the run.
It must belong to the same base model. Stages are counted on for the seed, so a stream that is cut in two trains as one.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files, read_json, write_json
from mcit.data_prep.hub import is_hub, is_pinned, same_dataset, split_place
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, read_serving

MANIFEST = "mcit.json"  # of a published stage
EXTENDED, CARRIED = "extended", "carried"  # folders of one, beside `method`: see `mcit.eval.serving`
_PLACES = ("adapter", "merged", EXTENDED, CARRIED, "method")  # what lies in stages/00-base
_RECORD = "start.json"  # in stages/00-base: where the run went on from
_POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # never a pickle


class Base(BaseModel):
    """The base model as a published stage names it."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None  # on the Hub, if it is known
    revision: str | None = None
    hash: str


class Manifest(BaseModel):
    """`mcit.json`: what is read of it."""

    model_config = ConfigDict(extra="ignore")
    schema_version: Literal[1]
    stage: int = Field(gt=0)
    behind: int = Field(ge=0)  # stages before the run's own first
    kind: Literal["adapter", "merged", "extended"]
    rank: int | None
    hash: str
    carried: str | None = None  # hash of the adapter in `carried/`, where the stream goes on from it
    base: Base
    state: list[str]


@dataclass(frozen=True)
class Start:
    """A policy to go on from, with the state of its methods."""

    place: str
    policy: list[Path]  # files of one folder, as are `carried` and `state`
    carried: list[Path]  # of an adapter that is gone on from in the policy's place; none: the policy is
    state: list[Path]
    kind: Literal["adapter", "merged", "extended"]
    rank: int | None
    hash: str
    carried_hash: str | None
    base: Base
    stages: int  # trained so far, from the untouched base on

    @property
    def entering_rank(self) -> int:
        """Of the LoRA that the first stage enters with; 0 where it is none."""
        config = next((file for file in self.carried or self.policy if file.name == "adapter_config.json"), None)
        return int(read_json(config)["r"]) if config else 0

    def identity(self) -> dict[str, Any]:
        """What a stage that enters with it depends on."""
        known = {"hash": self.hash, "state": state_hash(self.state), "stages": self.stages}
        return known | ({"carried": self.carried_hash} if self.carried_hash else {})


def pin_start(place: str, before: str | None) -> str:
    """A published place with the commit that it stands for; `before` is what the run began with. Raises `InputError`.

    A folder stays as it is.
    """
    if not is_hub(place):
        return place
    if before is not None and is_hub(before) and not is_pinned(place) and same_dataset(before, place):
        return before
    hub_id, revision = split_place(place)
    return f"hub:{hub_id}@{_download(place, [MANIFEST]).name}" if len(revision or "") != 40 else place


def find_start(place: str) -> Start:
    """The policy that `start_from` names: a folder, or hub:owner/name@revision, which is fetched.

    Raises `InputError`.
    """
    if is_hub(place):
        below = [f"{name}/{pattern}" for name in (EXTENDED, CARRIED, "method") for pattern in _POLICY_FILES]
        return _published(place, _download(place, [MANIFEST, *_POLICY_FILES, *below]))
    folder = Path(place)
    if (folder / MANIFEST).is_file():
        return _published(place, folder)
    if (folder / "recipe.yaml").is_file():
        folder = _last_stage(folder)
    if not (folder / "serving.json").is_file():
        remedy = "Name a run, a folder in its stages/, or hub:owner/name@stage-01-name"
        problem = "is neither a run nor a stage of one" if folder.is_dir() else "no such folder"
        raise InputError(problem, where=place, field="start_from", remedy=remedy)
    serving = read_serving(folder)
    if serving.kind == "base":
        remedy = "Leave start_from out: a run begins with the base"
        raise InputError("is the untouched base", where=place, field="start_from", remedy=remedy)
    assert serving.path is not None
    base = Base(model=serving.base, revision=serving.revision, hash=serving.base_hash)
    stages = stages_behind(folder.parent / "00-base") + serving.stage
    carried = folder / serving.carried if serving.carried else None
    return Start(
        place=place,
        policy=_files(folder / serving.path),
        carried=_files(carried) if carried else [],
        state=_files(folder / "method"),
        kind=serving.kind,
        rank=serving.rank,
        hash=serving.hash,
        carried_hash=_hash(carried, "adapter") if carried else None,
        base=base,
        stages=stages,
    )


def check_start(start: Start, lineage: str, carrier: str | None) -> None:
    """Refuse a start that the first stage, of this `lineage`, would not enter with.

    `carrier` is the method that carries the policy in the place of a LoRA: it goes on from its own state. Raises
    `InputError`.
    """
    if carrier is not None:
        if carrier not in {file.stem for file in start.state}:
            problem = f"has no state of {carrier}, which goes on from nothing else"
            raise InputError(problem, where=start.place, field="start_from", remedy="Set method as that run has it")
    elif not start.carried and start.kind != "adapter" and (start.kind, lineage) != ("merged", "full"):
        what = {"merged": "a merged model", "extended": "modules of a method's own on the base"}[start.kind]
        remedy = "Set method as that run has it" + (", or train.lineage: full" if start.kind == "merged" else "")
        problem = f"is {what}, and the first stage trains a LoRA"
        raise InputError(problem, where=start.place, field="start_from", remedy=remedy)


def place_start(start: Start, base: Serving, folder: Path) -> Serving:
    """Copy a policy and its state into `folder`, `stages/00-base`; returns how it is served there.

    `base` is how the untouched base is served. Raises `InputError` if the policy belongs to another base, is not what
    it is said to be, or is no plain LoRA.
    """
    if start.base.hash != base.base_hash:
        other = f"{start.base.model or 'a model'} ({start.base.hash[:12]})"
        problem = f"was trained on another base model: {other}, and base_model is {base.base} ({base.base_hash[:12]})"
        remedy = "Set base_model to the files that it was trained on"
        raise InputError(problem, where=start.place, field="start_from", remedy=remedy)
    for name in _PLACES:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name, files in ((start.kind, start.policy), (CARRIED, start.carried), ("method", start.state)):
        for file in files:
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name / file.name)
    carried = _hash(folder / CARRIED, "adapter") if start.carried else None
    if (_hash(folder / start.kind, start.kind), carried) != (start.hash, start.carried_hash):
        remedy = "The files are incomplete, or were changed: publish or copy them again"
        raise InputError("holds another policy than it says", where=start.place, field="start_from", remedy=remedy)
    write_json(folder / _RECORD, {"start_from": start.place, **start.identity()})
    update = {"name": "start", "kind": start.kind, "path": start.kind, "rank": start.rank, "hash": start.hash}
    return base.model_copy(update={**update, "carried": CARRIED if carried else None})


def start_inputs(place: str, folder: Path) -> dict[str, Any]:
    """What the step that takes up a start depends on; once it is in `folder`, where it came from may be gone."""
    if is_hub(place):  # with its commit
        return {"start_from": place}
    if Path(place).exists():
        return {"start_from": place, **find_start(place).identity()}
    record = read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
    return record if record.get("start_from") == place else {"start_from": place}


def stages_behind(folder: Path) -> int:
    """How many stages the policy in `stages/00-base` has behind it: 0 for the untouched base."""
    return int(read_json(folder / _RECORD)["stages"]) if (folder / _RECORD).exists() else 0


def forget_start(folder: Path) -> None:
    """Make `stages/00-base` the place of the untouched base again."""
    (folder / _RECORD).unlink(missing_ok=True)
    for name in _PLACES:
        shutil.rmtree(folder / name, ignore_errors=True)


def state_hash(files: list[Path]) -> str | None:
    """The identity of a method's state; None where there is none."""
    return hash_files(files, files[0].parent.parent) if files else None


def _hash(folder: Path, kind: str) -> str:
    if kind != "adapter":
        return hash_model(str(folder))
    from mcit.eval.lora import hash_adapter, load_adapter  # here: needs torch

    load_adapter(folder)  # refuses anything but plain factors of linear layers
    return hash_adapter(folder)


def _published(place: str, folder: Path) -> Start:
    try:
        manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=f"{place}: {MANIFEST}", field=".".join(map(str, first["loc"]))) from None
    state = [folder / name for name in manifest.state]
    for file in state:
        if file.parent.resolve() != (folder / "method").resolve() or file.suffix != ".safetensors":
            raise InputError("is no state of a method", where=f"{place}: {MANIFEST}", field="state")
    names = ("adapter_config.json", "adapter_model.safetensors")
    if manifest.kind == "adapter":
        policy = [folder / name for name in names]
    elif manifest.kind == "extended":
        policy = _files(folder / EXTENDED)
    else:  # beside a whole model lie results and cards, which are no part of it
        policy = [file for file in _files(folder) if file.name not in (MANIFEST, "results.json")]
    carried = [folder / CARRIED / name for name in names] if manifest.carried else []
    for file in (*policy, *carried, *state):
        if not file.is_file():
            raise InputError("is missing", where=f"{place}: {file.name}", field="start_from")
    return Start(
        place=place,
        policy=policy,
        carried=carried,
        state=state,
        kind=manifest.kind,
        rank=manifest.rank,
        hash=manifest.hash,
        carried_hash=manifest.carried,
        base=manifest.base,
        stages=manifest.behind + manifest.stage,
    )


def _files(folder: Path) -> list[Path]:
    return sorted(file for pattern in _POLICY_FILES for file in folder.glob(pattern))


def _last_stage(run: Path) -> Path:
    done = sorted(marker.parent for marker in (run / "stages").glob("[0-9]*-*/done.json"))
    if not done or done[-1].name == "00-base":
        raise InputError("has no stage that is done", where=run, field="start_from", remedy="Train one first")
    return done[-1]


def _download(place: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, revision = split_place(place)
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # offline, gated, misspelt: the Hub client has an exception for each, none of them ours
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "Check the name and the network, log in with `hf auth login`, or give a local folder"
        raise InputError(
            f"could not be had from the Hub ({reason})", where=place, field="start_from", remedy=remedy
        ) from None
    if not (folder / MANIFEST).is_file():
        remedy = "Only what `mcit publish` has published can be gone on from"
        raise InputError(f"holds no {MANIFEST}", where=place, field="start_from", remedy=remedy)
    return folder
