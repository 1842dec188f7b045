"""Fill cells of the matrix: every task asked of every policy, in one engine, resumable at the first missing answer.

    python -m mcit.eval.evaluate RUN --cells cells.json

`cells.json` holds `{"cells": [[stage, task], …], "config": {…}}`, the config being the recipe's `eval:` section.
"""

import argparse
import contextlib
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mcit.data_prep.errors import InputError, not_written
from mcit.data_prep.files import hash_json, read_json
from mcit.data_prep.schema import Config

from .asking import Asking
from .cells import Cell, finish, load_cell, resume
from .config import EvalConfig
from .engines.base import Engine, Policy, Request, Response, Scored, Unscored
from .hashing import cache_dir, hash_model

if TYPE_CHECKING:
    from .liveness import Scores

_PRINT_EVERY = 10.0  # seconds between lines of progress without a terminal


class Cells(Config):
    """`cells.json`."""

    cells: list[tuple[int, str]]
    config: EvalConfig
    modules: list[str] = []  # folders with scorers of the user's own  # noqa: RUF012


def evaluate_cells(
    run_dir: Path, cells: Iterable[tuple[int, str]], config: EvalConfig, cache: Path | None = None
) -> None:
    """Answer and score every cell (stage, task) that is not done.

    Base and LoRA policies share one engine; each merged or extended policy, and each of a rank above vLLM's limit, then
    has its own. Answers are kept as they come (`predictions/<kk>/<task>.partial.jsonl`,
    `<task>+constrained.partial.jsonl`, …) and, once a cell is complete, under their fingerprint in `cache/predictions/`
    (default: `$MCIT_CACHE` or `~/.cache/mcit`), where other runs find them: row 0 is asked once.
    Raises `InputError`, also when a policy fails the checks of `mcit.eval.liveness`.
    """
    cache = cache or cache_dir()
    todo = [cell for cell in (load_cell(run_dir, *cell, config) for cell in dict.fromkeys(cells)) if not cell.is_done()]
    for cell in todo:
        resume(cell, cache)
        if cell.is_complete:
            _finish(cell, cache)
    todo = [cell for cell in todo if not cell.is_complete]
    if not todo:
        return
    _check_bases(todo)
    from .engines import share  # here: imports vLLM, which takes seconds

    groups = share((cell.policy for cell in todo), config)
    gc.freeze()  # what has been imported stays, and engines collect garbage several times when they close
    for policies in groups:
        served = {policy.serving.hash for policy in policies}
        _evaluate_group(policies, [cell for cell in todo if cell.policy.serving.hash in served], config, cache)


def _check_bases(cells: Iterable[Cell]) -> None:
    """Every policy belongs to the base it names, and that base is still what it was. Raises `InputError`."""
    hashes: dict[tuple[str, str | None], str] = {}
    for cell in cells:
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


def _evaluate_group(policies: Sequence[Policy], cells: Sequence[Cell], config: EvalConfig, cache: Path) -> None:
    """Evaluate the cells of `policies`, which share an engine."""
    from .engines import make_engine

    start = time.monotonic()
    probes = choose_probes(cells, config.probes)
    max_images = max(len(sample["images"]) for cell in cells for sample in cell.samples)
    reference = _reference(policies, probes, config)
    engine = make_engine(policies, config, max_images, say=_say)
    try:
        _say(f"{engine.name} started in {time.monotonic() - start:.1f} s, policies: {len(policies)}")
        _prove(engine, policies, probes, reference, config)
        cells[0].seconds += time.monotonic() - start
        _answer(engine, cells, config, cache)
    finally:
        engine.close()


def choose_probes(cells: Sequence[Cell], count: int) -> list[Request]:
    """The same `count` questions for every policy, spread over the tasks."""
    by_task = {cell.task["name"]: cell for cell in cells}
    ordered = [
        [cell.askings[0].requests[name] for name in sorted((s["id"] for s in cell.samples), key=hash_json)[:count]]
        for _, cell in sorted(by_task.items())
    ]
    turns = (request for turn in zip_longest(*ordered) for request in turn if request is not None)
    return [request for _, request in zip(range(count), turns, strict=False)]


def _reference(policies: Sequence[Policy], probes: Sequence[Request], config: EvalConfig) -> "Scores | None":
    """What transformers says of the probes, if another engine is to be compared with it. Before that takes the memory.

    Of an adapter that is served as a merged copy, this is the adapter on the base.
    """
    from .engines import engine_name
    from .liveness import transformers_scores, unproven

    name = engine_name(policies[0], config)
    if name == "transformers" or (config.remote and name == "remote" and not config.remote.parity):
        return None
    todo = unproven(policies, name, config)
    return transformers_scores(todo, probes, config) if todo else None


def _prove(
    engine: Engine,
    policies: Sequence[Policy],
    probes: Sequence[Request],
    reference: "Scores | None",
    config: EvalConfig,
) -> None:
    """The checks of `mcit.eval.liveness`, for the policies that have not passed them with this engine."""
    from .liveness import engine_scores, prove, unproven

    todo = unproven(policies, engine.name, config)
    if not todo:
        return
    bases = [base for base in [todo[0].base()] if engine.serves(base)]
    try:
        # The base last, once every adapter was active: a server that then mixes them up is found out.
        scores = engine_scores(engine, [*todo, *bases], probes)
    except Unscored as reason:
        _say(f"{reason}: whether adapters act was NOT shown, and answers may be another policy's")
        return
    for result in prove(todo, engine.name, scores, reference if engine.name != "transformers" else None, config):
        _say(result["note"])


def _answer(engine: Engine, cells: Sequence[Cell], config: EvalConfig, cache: Path) -> None:
    """Ask what is missing, keep each answer at once, and finish each cell with its last one."""
    left = [(cell, asking, asking.begin(engine.name)) for cell in cells for asking in cell.askings]
    with contextlib.ExitStack() as stack:
        files = {asking: stack.enter_context(asking.open()) for _, asking, _ in left}
        before = time.monotonic()

        def note(asking: Asking, name: str, answer: Mapping[str, Any]) -> None:
            asking.answers[name] = {**answer, "id": name}
            files[asking].write(json.dumps(asking.answers[name], ensure_ascii=False) + "\n")

        def keep(cell: Cell, asking: Asking, name: str, answer: Mapping[str, Any]) -> None:
            nonlocal before
            note(asking, name, answer)
            if asking.kind == "free" and (held := _held(cell, name)) and held.settled(name, answer):
                note(held, name, answer)
            now = time.monotonic()
            cell.seconds, before = cell.seconds + now - before, now
            if cell.is_complete:
                _finish(cell, cache)

        def then(index: int, response: Response) -> Request | None:
            """A free answer that has not the form is asked for again, held to it."""
            cell, asking, name = asked[index]
            held = _held(cell, name) if asking.kind == "free" else None
            if held is None or held.settled(name, response._asdict()):
                return None
            asked.append((cell, held, name))
            return held.requests[name]

        for cell, asking, names in left:
            if asking.kind == "gold":
                scored = _likelihoods(engine, [asking.requests[name] for name in names])
                for name, (_, logprobs) in zip(names, scored, strict=True):
                    keep(cell, asking, name, {"logprob": math.fsum(logprobs), "tokens": len(logprobs)})
            elif asking.kind == "constrained":  # of answers that were there already
                for name in names:
                    free = cell.askings[0].answers.get(name)
                    if free and asking.settled(name, free):
                        keep(cell, asking, name, free)
        asked = list(_turns(left))
        requests = [asking.requests[name] for _, asking, name in asked]
        for index, response in _progress(engine.stream(requests, config.max_new_tokens, then), asked):
            keep(*asked[index], response._asdict())


def _likelihoods(engine: Engine, requests: Sequence[Request]) -> list[Scored]:
    try:
        scored = engine.logprobs(requests)
    except Unscored as reason:
        remedy = "Tasks beside the stream need them: use another engine, or leave them out"
        raise InputError(str(reason), field="eval.general", remedy=remedy) from None
    for request, one in zip(requests, scored, strict=True):
        if not all(map(math.isfinite, one.logprobs)):
            serving = request.policy.serving
            problem = f"log-probabilities of stage {serving.stage} are not finite: broken weights, or too much for "
            raise InputError(problem + serving.dtype, where=request.policy.folder, field=request.completion[:60])
    return scored


def _held(cell: Cell, name: str) -> Asking | None:
    """The asking that holds a sample's answer to its form, if it has no answer yet."""
    held = cell.held
    return held if held and name in held.requests and name not in held.answers else None


def _turns(left: Iterable[tuple[Cell, Asking, list[str]]]) -> Iterator[tuple[Cell, Asking, str]]:
    """What is to be asked, cell by cell; a question in its several ways at once, so that it finds warm caches.

    What is held to a form comes after the free answer, and is asked here only where that is there already.
    """
    for cell, ways in groupby(left, key=lambda one: one[0]):
        asked = [
            [(cell, asking, name) for name in names if name not in asking.answers and _is_due(cell, asking, name)]
            for _, asking, names in ways
        ]
        yield from (one for turn in zip_longest(*asked) for one in turn if one)


def _is_due(cell: Cell, asking: Asking, name: str) -> bool:
    return asking.kind != "gold" and (asking.kind != "constrained" or name in cell.askings[0].answers)


def _finish(cell: Cell, cache: Path) -> None:
    score = finish(cell, cache)
    _say(f"stage {cell.stage}  {cell.task['name']:<16} {score:6.2f}")


def _progress(answers: Iterator[tuple[int, Response]], asked: Sequence[object]) -> Iterator[tuple[int, Response]]:
    """Pass answers on, with a bar on a terminal and a line now and then elsewhere. `asked` may grow."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(answers, total=len(asked), desc="answers", unit="") as bar:
            for answer in bar:
                bar.total = len(asked)
                yield answer
        return
    last = time.monotonic()
    for done, answer in enumerate(answers, 1):
        yield answer
        if time.monotonic() - last > _PRINT_EVERY:
            last = time.monotonic()
            _say(f"{done} of {len(asked)} answers")


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
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every cell has its files open
    try:
        try:
            wanted = Cells.model_validate(read_json(options.cells))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(first["msg"], where=options.cells, field=".".join(map(str, first["loc"]))) from None
        sys.path += wanted.modules  # last: a folder of theirs may be called like a library
        evaluate_cells(options.run, wanted.cells, wanted.config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        print(f"error: {not_written(error, options.run / 'predictions')}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
