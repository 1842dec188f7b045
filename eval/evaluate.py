"""Fill cells of the matrix: every task asked of every policy, in one engine, resumable at the first missing answer.

    python -m mcit.eval.evaluate RUN --cells cells.json

`cells.json` holds `{"cells": [[stage, task], …], "config": {…}}`, the config being the recipe's `eval:` section.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files, hash_json, read_json, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.schema import Config, PreparedTask, Sample

from .config import EvalConfig
from .engines.base import Engine, Policy, Request, Response, read_policy
from .hashing import cache_dir, hash_model
from .scorers import get_scorer
from .scoring import aggregate, score_response

_ANSWERS = 1  # raised when the same request would get another answer from this code
_PRINT_EVERY = 10.0  # seconds between lines of progress without a terminal


class Cells(Config):
    """`cells.json`."""

    cells: list[tuple[int, str]]
    config: EvalConfig


@dataclass(eq=False)
class Cell:
    """One task under the policy of one stage, and the answers there are so far, by sample id."""

    stage: int
    policy: Policy
    folder: Path  # RUN/data/<task>
    task: PreparedTask
    predictions: Path  # RUN/predictions/<kk>
    answers_key: str  # what the answers depend on
    fingerprint: str  # what the scores depend on
    samples: list[Sample] = field(default_factory=list)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: str | None = None  # that gave the answers
    seconds: float = 0.0

    @property
    def marker(self) -> Path:
        return self.predictions / f"{self.task['name']}.done.json"

    @property
    def rows(self) -> Path:
        return self.predictions / f"{self.task['name']}.jsonl"

    @property
    def partial(self) -> Path:
        return self.predictions / f"{self.task['name']}.partial.jsonl"

    def is_done(self) -> bool:
        """Whether its scores are there and still valid."""
        return self.rows.exists() and self.marker.exists() and read_json(self.marker)["fingerprint"] == self.fingerprint

    def request(self, sample: Sample) -> Request:
        """A sample as a question to this cell's policy. The completion is what `logprobs` would score."""
        images = [image_path(self.folder, self.task, name) for name in sample["images"]]
        return Request(sample["prompt"], images, self.policy, sample["completion"][0]["content"])


def evaluate_cells(
    run_dir: Path, cells: Iterable[tuple[int, str]], config: EvalConfig, cache: Path | None = None
) -> None:
    """Answer and score every cell (stage, task) that is not done.

    Base and LoRA policies share one engine; each merged policy then has one of its own. Answers are kept as they come
    (`predictions/<kk>/<task>.partial.jsonl`) and, once a cell is complete, under their fingerprint in
    `cache/predictions/` (default: `$MCIT_CACHE` or `~/.cache/mcit`), where other runs find them: row 0 is asked once.
    Raises `InputError`, also when a policy fails the checks of `mcit.eval.liveness`.
    """
    cache = cache or cache_dir()
    todo = [cell for cell in (load_cell(run_dir, *cell, config) for cell in cells) if not cell.is_done()]
    groups: dict[str, list[Cell]] = {}
    for cell in todo:
        cell.samples = _samples(cell)
        kept = _read_answers(_cached(cache, cell), cell)
        if not kept or len(kept[1]) < len(cell.samples):
            kept = _read_answers(cell.partial, cell) or kept
        cell.engine, cell.answers = kept or (None, {})
        if len(cell.answers) == len(cell.samples):
            _finish(cell, cache)
        else:
            groups.setdefault(cell.policy.engine_key, []).append(cell)
    _check_bases(groups)
    for group in sorted(groups.values(), key=lambda group: group[0].policy.serving.kind == "merged"):
        _evaluate_group(group, config, cache)


def load_cell(run_dir: Path, stage: int, task: str, config: EvalConfig) -> Cell:
    """A cell and its fingerprints, from the run's files. Raises `InputError` where they are missing."""
    folders = sorted((run_dir / "stages").glob(f"{stage:02d}-*/serving.json"))
    if len(folders) != 1:
        problem = "has not been trained yet" if not folders else "has more than one folder"
        raise InputError(problem, where=run_dir / "stages", field=f"stage {stage}")
    policy, folder = read_policy(folders[0].parent), run_dir / "data" / task
    info = read_task(folder)
    serving = policy.serving
    answers = {
        "version": _ANSWERS,
        "policy": serving.model_dump(include={"kind", "hash", "base_hash", "dtype", "processor"}),
        "data": info["test_hash"],
        "options": config.model_dump(include={"engine", "max_new_tokens", "max_model_len"}),
    }
    answers_key = hash_json(answers)
    scores = {"answers": answers_key, "scorer": info["scorer"], "code": _scoring_code()}
    return Cell(stage, policy, folder, info, run_dir / "predictions" / f"{stage:02d}", answers_key, hash_json(scores))


@lru_cache(maxsize=1)
def _scoring_code() -> str:
    """The identity of the code that scores. Scoring again costs nothing, since answers are kept apart from scores."""
    folder = Path(__file__).parent
    files = [folder / name for name in ("scorers.py", "scoring.py", "stats.py", "text.py")]
    return hash_files([*files, *(folder.parent / "data_prep" / name for name in ("styles.py", "answers.py"))], folder)


def _samples(cell: Cell) -> list[Sample]:
    samples = read_samples(cell.folder, "test")
    if not samples:
        raise InputError("the test part is empty", where=cell.folder)
    if len({sample["id"] for sample in samples}) < len(samples):
        raise InputError("an id occurs twice in the test part", where=cell.folder)
    return samples


def _check_bases(groups: Mapping[str, Sequence[Cell]]) -> None:
    """Every policy belongs to the base it names, and that base is still what it was. Raises `InputError`."""
    hashes: dict[tuple[str, str | None], str] = {}
    for cell in (cell for group in groups.values() for cell in group):
        serving = cell.policy.serving
        key = (serving.base, serving.revision)
        if key not in hashes:
            hashes[key] = hash_model(*key)
        if serving.base_hash != hashes[key]:
            raise InputError(
                f"was made for another base model than the one in {serving.base}",
                where=cell.policy.folder / "serving.json",
                field="base_hash",
                remedy="Restore that model, or train the stage again",
            )


def _evaluate_group(cells: Sequence[Cell], config: EvalConfig, cache: Path) -> None:
    """Evaluate cells that share an engine."""
    from .engines import make_engine

    start = time.monotonic()
    policies = list({cell.policy.serving.hash: cell.policy for cell in cells}.values())
    served = policies if policies[0].serving.kind == "merged" else [*policies, policies[0].base()]
    probes = _probes(cells, config.probes)
    max_images = max(len(sample["images"]) for cell in cells for sample in cell.samples)
    reference = _reference(policies, probes, config)
    engine = make_engine(served, config, max_images, say=_say)
    try:
        _say(f"{engine.name} started in {time.monotonic() - start:.1f} s, with {len(policies)} policies")
        _prove(engine, policies, probes, reference, config)
        cells[0].seconds += time.monotonic() - start
        _answer(engine, cells, config, cache)
    finally:
        engine.close()


def _probes(cells: Sequence[Cell], count: int) -> list[Request]:
    """The same `count` questions for every policy, spread over the tasks."""
    by_task = {cell.task["name"]: cell for cell in cells}
    ordered = [
        [cell.request(sample) for sample in sorted(cell.samples, key=lambda sample: hash_json(sample["id"]))[:count]]
        for _, cell in sorted(by_task.items())
    ]
    turns = (request for turn in zip_longest(*ordered) for request in turn if request is not None)
    return [request for _, request in zip(range(count), turns, strict=False)]


def _reference(policies: Sequence[Policy], probes: Sequence[Request], config: EvalConfig) -> Any:
    """What transformers says of the probes, if vLLM is to be compared with it. Before vLLM takes the memory."""
    from .engines.vllm import why_not_vllm
    from .liveness import transformers_scores, unproven

    if config.engine == "transformers" or why_not_vllm(policies[0]) is not None:
        return None
    todo = unproven(policies, "vllm", config)
    return transformers_scores(todo, probes, config) if todo else None


def _prove(
    engine: Engine, policies: Sequence[Policy], probes: Sequence[Request], reference: Any, config: EvalConfig
) -> None:
    from .liveness import engine_scores, prove, unproven

    todo = unproven(policies, engine.name, config)
    if not todo:
        return
    bases = [] if todo[0].serving.kind == "merged" else [todo[0].base()]
    scores = engine_scores(engine, [*bases, *todo], probes)
    for result in prove(todo, engine.name, scores, reference if engine.name == "vllm" else None, config):
        _say(result["note"])


def _answer(engine: Engine, cells: Sequence[Cell], config: EvalConfig, cache: Path) -> None:
    """Ask what is missing, keep each answer at once, and finish each cell with its last one."""
    asked: list[tuple[Cell, Sample]] = []
    for cell in cells:
        if cell.engine != engine.name:  # answers of two engines are not mixed
            cell.engine, cell.answers = engine.name, {}
        asked += [(cell, sample) for sample in cell.samples if sample["id"] not in cell.answers]
    with contextlib.ExitStack() as stack:
        files = {cell: stack.enter_context(_open_partial(cell)) for cell in cells}
        before = time.monotonic()
        requests = [cell.request(sample) for cell, sample in asked]
        for index, response in _progress(engine.stream(requests, config.max_new_tokens), len(requests)):
            cell, sample = asked[index]
            row = {"id": sample["id"], **response._asdict()}
            cell.answers[sample["id"]] = row
            files[cell].write(json.dumps(row, ensure_ascii=False) + "\n")
            now = time.monotonic()
            cell.seconds, before = cell.seconds + now - before, now
            if len(cell.answers) == len(cell.samples):
                _finish(cell, cache)


def _open_partial(cell: Cell) -> TextIO:
    """The partial file, holding what is known already, open for more; each line is written at once."""
    write_jsonl(cell.partial, [{"fingerprint": cell.answers_key, "engine": cell.engine}, *cell.answers.values()])
    return open(cell.partial, "a", encoding="utf-8", buffering=1)


def _read_answers(path: Path, cell: Cell) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """The engine and the whole lines of an answers file that belongs to this cell; None if there is none."""
    if not path.exists():
        return None
    rows = list(_whole_lines(path))
    if not rows or rows[0].get("fingerprint") != cell.answers_key:
        return None
    wanted = {sample["id"] for sample in cell.samples}
    return rows[0]["engine"], {row["id"]: row for row in rows[1:] if row["id"] in wanted}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows up to the first that was cut off (by a kill, or a full disk)."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _cached(cache: Path, cell: Cell) -> Path:
    return cache / "predictions" / f"{cell.answers_key}.jsonl"


def _finish(cell: Cell, cache: Path) -> None:
    """Score a complete cell and write its files; the marker comes last."""
    scorer = get_scorer(cell.task["scorer"])
    rows = []
    for sample in cell.samples:
        answer = cell.answers[sample["id"]]
        score = score_response(sample, answer["text"], scorer, answer["finished"])
        rows.append(
            {
                "id": sample["id"],
                "prompt": answer["prompt"],
                "response": answer["text"],
                "references": sample["references"],
                "style": sample["style"],
                "constrained_score": None,
                **score,
                "image_id": (sample.get("meta") or {}).get("image_id"),
                "finished": answer["finished"],
                "tokens": answer["tokens"],
            }
        )
    cell.marker.unlink(missing_ok=True)
    write_jsonl(cell.rows, rows)
    if not _cached(cache, cell).exists():
        answers = [cell.answers[sample["id"]] for sample in cell.samples]
        write_jsonl(_cached(cache, cell), [{"fingerprint": cell.answers_key, "engine": cell.engine}, *answers])
    marker = {
        "fingerprint": cell.fingerprint,
        **aggregate(rows),
        "policy_hash": cell.policy.serving.hash,
        "data_hash": cell.task["test_hash"],
        "engine": cell.engine,
        "seconds": round(cell.seconds, 3),
    }
    write_json(cell.marker, marker)
    cell.partial.unlink(missing_ok=True)
    _say(f"stage {cell.stage}  {cell.task['name']:<16} {marker['score']:6.2f}")


def _progress(answers: Iterator[tuple[int, Response]], total: int) -> Iterator[tuple[int, Response]]:
    """Pass answers on, with a bar on a terminal and a line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(answers, total=total, desc="answers", unit="")
        return
    last = time.monotonic()
    for done, answer in enumerate(answers, 1):
        yield answer
        if time.monotonic() - last > _PRINT_EVERY:
            last = time.monotonic()
            _say(f"{done} of {total} answers")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line)
    else:
        print(line, flush=True)


def main() -> None:
    """Command line. Exits 2 with one line, `error: …`, for bad input."""
    parser = argparse.ArgumentParser(description="Evaluate cells of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--cells", type=Path, required=True, help="JSON file with the cells and the eval config")
    options = parser.parse_args()
    try:
        try:
            wanted = Cells.model_validate(read_json(options.cells))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(first["msg"], where=options.cells, field=".".join(map(str, first["loc"]))) from None
        evaluate_cells(options.run, wanted.cells, wanted.config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
