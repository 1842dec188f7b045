"""Cells of the matrix: complete or absent, continued where they stopped, never asked twice."""

import json
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import TINY, base_policy, lora_policy, make_task, merged_policy

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl, write_json
from mcit.data_prep.schema import TaskConfig
from mcit.eval import engines, evaluate, hashing
from mcit.eval.cells import resume
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Request, Response, vllm
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.evaluate import evaluate_cells, load_cell
from mcit.eval.scorers import SCORERS, Scorer, get_scorer
from mcit.eval.scoring import set_score

SLOW = EvalConfig(engine="transformers", max_new_tokens=4, probes=2, constrained=False)
HELD = SLOW.model_copy(update={"constrained": True})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a base, one adapter and one task with images, not evaluated."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    base_policy(folder / "stages")
    lora_policy(folder / "stages", 1, "seen", 4)
    make_task(folder, "seen", 1, 6)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that reach the transformers engine, as "stage question"."""
    questions: list[str] = []
    stream = TransformersEngine.stream

    def spy(self: Any, requests: Sequence[Request], *others: Any) -> Iterator[tuple[int, Response]]:
        for r in requests:
            question = r.prompt[0]["content"].split("\n")[0]
            questions.append(f"{r.policy.serving.stage} {question}{' (held)' if r.pattern else ''}")
        return stream(self, requests, *others)

    monkeypatch.setattr(TransformersEngine, "stream", spy)
    return questions


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(engines, "make_engine", fail)
    return monkeypatch


def predictions(run: Path, stage: int, task: str = "seen") -> list[Any]:
    return read_jsonl(run / "predictions" / f"{stage:02d}" / f"{task}.jsonl")


def test_a_whole_matrix_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, two adapters of different ranks, one that is zero (more than vLLM has slots for), and a merged model; one
    task with two images, one without."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(vllm, "SLOT_RANKS", 16)
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    stages = run / "stages"
    base_policy(stages)
    lora_policy(stages, 1, "a", 4)
    eight = lora_policy(stages, 2, "b", 8)
    lora_policy(stages, 3, "nothing", 4, zero=True)
    merged_policy(stages, 4, "whole", eight)
    samples = {"pairs": make_task(run, "pairs", 2, 7), "text": make_task(run, "text", 0, 5)}
    cells = [(k, task) for k in range(5) for task in samples]
    config = EvalConfig(engine="vllm", max_new_tokens=8, probes=3, constrained=False)
    evaluate_cells(run, cells, config)

    answers = {cell: [row["response"] for row in predictions(run, *cell)] for cell in cells}
    assert answers[3, "pairs"] == answers[0, "pairs"] and answers[3, "text"] == answers[0, "text"]
    assert answers[4, "pairs"] == answers[2, "pairs"] and answers[4, "text"] == answers[2, "text"]
    assert len({(*answers[k, "pairs"], *answers[k, "text"]) for k in range(3)}) == 3
    live = {k: read_json(next(stages.glob(f"{k:02d}-*/liveness.json"))) for k in range(5)}
    assert all(proof["ok"] and proof["engine"] == "vllm" and proof["gap"] < 1e-3 for proof in live.values())
    assert [live[k]["zero"] for k in range(5)] == [False, False, False, True, False]
    assert all(live[k]["effect"] > 0.01 for k in (1, 2, 4))

    for (k, task), samples_of in ((cell, samples[cell[1]]) for cell in cells):
        rows = predictions(run, k, task)
        marker = read_json(run / "predictions" / f"{k:02d}" / f"{task}.done.json")
        assert [row["id"] for row in rows] == [sample["id"] for sample in samples_of]
        assert set(rows[0]) == {
            "id", "prompt", "response", "parsed", "references", "style", "reasoning", "options", "score",
            "constrained_score", "format_ok", "content_ok", "content_score", "verdict", "think", "image_id", "finished",
            "tokens",
        }  # fmt: skip
        assert rows[0]["prompt"].count("<|image_pad|>") == (2 if task == "pairs" else 0)
        assert rows[0]["image_id"] == ("image-0" if task == "pairs" else None)
        assert marker["n"] == len(rows) and marker["score"] == sum(row["score"] for row in rows) / len(rows)
        assert marker["policy_hash"] == load_cell(run, k, task, config).policy.serving.hash
        assert marker["data_hash"] == read_json(run / "data" / task / "task.json")["test_hash"]
        assert marker["engine"] == "vllm"
        assert not (run / "predictions" / f"{k:02d}" / f"{task}.partial.jsonl").exists()


def test_adapters_above_the_highest_rank_are_served_as_merged_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under a limit of 4: base and rank 4 share an engine, rank 8 has one of its own, whose weights are gone after."""
    pytest.importorskip("vllm")
    for module in (engines, vllm):
        monkeypatch.setattr(module, "MAX_RANK", 4)
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    base_policy(run / "stages")
    lora_policy(run / "stages", 1, "low", 4)
    lora_policy(run / "stages", 2, "high", 8)
    make_task(run, "seen", 1, 6)
    cells = [(k, "seen") for k in range(3)]
    evaluate_cells(run, cells, EvalConfig(engine="vllm", max_new_tokens=8, probes=2, constrained=False))
    markers = [read_json(run / "predictions" / f"{k:02d}" / "seen.done.json") for k in range(3)]
    assert [marker["engine"] for marker in markers] == ["vllm", "vllm", "vllm (merged copy)"]
    for k, marker in enumerate(markers):
        proof = read_json(next((run / "stages").glob(f"{k:02d}-*/liveness.json")))
        assert marker["log_prob_gap"] == proof["gap_max"] < 1e-3 and proof["engine"] == marker["engine"]
    lines = capfd.readouterr().out
    assert re.search(r"vllm started in .* policies: 2\n", lines)
    assert re.search(r"vllm \(merged copy\) started in .* policies: 1\n", lines)
    assert re.search(r"stage 2 \(high\): acts .*, vllm \(merged copy\) and transformers agree within", lines)
    assert [path.suffix for path in (tmp_path / "cache" / "merged").iterdir()] == [".lock"]
    merged = [[row["response"] for row in predictions(run, k)] for k in range(3)]
    assert merged[0] != merged[1] != merged[2] != merged[0]

    monkeypatch.undo()  # served as a LoRA, the same adapter says the same
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "another-cache"))
    (run / "predictions" / "02" / "seen.done.json").unlink()
    evaluate_cells(run, cells, EvalConfig(engine="vllm", max_new_tokens=8, probes=2, constrained=False))
    assert [row["response"] for row in predictions(run, 2)] == merged[2]
    assert read_json(run / "predictions" / "02" / "seen.done.json")["engine"] == "vllm"


def test_nothing_is_asked_twice(run: Path, no_engine: pytest.MonkeyPatch) -> None:
    cells = [(0, "seen"), (1, "seen")]
    with pytest.raises(AssertionError, match="an engine was started"):
        evaluate_cells(run, cells, SLOW)
    no_engine.undo()
    no_engine.setenv("MCIT_CACHE", str(run.parent / "cache"))
    evaluate_cells(run, cells, SLOW)
    before = {path: path.stat().st_mtime_ns for path in (run / "predictions").rglob("*")}
    no_engine.setattr(engines, "make_engine", None)
    evaluate_cells(run, cells, SLOW)
    assert {path: path.stat().st_mtime_ns for path in (run / "predictions").rglob("*")} == before

    other = run.parent / "other"  # a run with the same base and data
    base_policy(other / "stages")
    make_task(other, "seen", 1, 6)
    evaluate_cells(other, [(0, "seen")], SLOW)
    assert predictions(other, 0) == predictions(run, 0)
    marker = read_json(other / "predictions" / "00" / "seen.done.json")
    assert marker["engine"] == "transformers" and marker["seconds"] == 0


def test_what_matters_asks_again_and_what_does_not_does_not(run: Path, asked: list[str]) -> None:
    evaluate_cells(run, [(0, "seen")], SLOW)
    assert len(asked) == 6
    evaluate_cells(run, [(0, "seen")], SLOW.model_copy(update={"batch_size": 2, "probes": 1}))
    assert len(asked) == 6
    evaluate_cells(run, [(0, "seen")], SLOW.model_copy(update={"max_new_tokens": 5}))
    assert len(asked) == 12
    task = run / "data" / "seen" / "task.json"
    for scorer in ("short", "coin:vizwiz", "bleu"):
        write_json(task, read_json(task) | {"scorer": scorer})  # scored again, not asked again
        evaluate_cells(run, [(0, "seen")], SLOW)
        rows = read_jsonl(run / "predictions" / "00" / "seen.jsonl")
        marker = read_json(run / "predictions" / "00" / "seen.done.json")
        whole = set_score(rows, get_scorer(scorer))
        assert len(asked) == 12 and (marker["score"], marker["stderr"]) == whole
    assert marker["stderr"] is None  # BLEU of a set is no mean
    write_json(task, read_json(task) | {"test_hash": "other data"})
    evaluate_cells(run, [(0, "seen")], SLOW)
    assert len(asked) == 18


def test_a_scorer_may_weigh_by_the_whole_test_set(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = Scorer(
        "weighed", lambda *_: 0.0, 50, None, whole=True, weigh=lambda corpus: lambda *_: float(len(corpus))
    )
    monkeypatch.setitem(SCORERS, "weighed", weighed)
    task = run / "data" / "seen" / "task.json"
    write_json(task, read_json(task) | {"scorer": "weighed"})
    evaluate_cells(run, [(0, "seen")], SLOW)
    assert read_json(run / "predictions" / "00" / "seen.done.json")["score"] == 6


def test_it_continues_at_the_first_missing_answer(run: Path, asked: list[str]) -> None:
    cell = load_cell(run, 1, "seen", SLOW)
    free = cell.askings[0]
    header = {"fingerprint": free.key, "engine": "transformers"}
    known = [{"id": f"seen-{i}", "text": f"kept {i}", "finished": True, "tokens": 2, "prompt": "p"} for i in (0, 1, 4)]
    lines = [json.dumps(row) for row in (header, *known)]
    cell.predictions.mkdir(parents=True)
    free.partial.write_text("\n".join(lines) + "\n" + lines[-1][:20])  # killed in the middle of a line
    evaluate_cells(run, [(1, "seen")], SLOW)
    assert sorted(asked) == [f"1 Is there a circle in row {i}?" for i in (2, 3, 5)]
    responses = [row["response"] for row in predictions(run, 1)]
    assert [responses[i] for i in (0, 1, 4)] == ["kept 0", "kept 1", "kept 4"]
    assert not free.partial.exists()


@pytest.mark.parametrize("change", [{"fingerprint": "of another policy"}, {"engine": "vllm"}])
def test_answers_that_belong_elsewhere_are_not_used(run: Path, asked: list[str], change: dict[str, str]) -> None:
    cell = load_cell(run, 1, "seen", SLOW)
    free = cell.askings[0]
    header = {"fingerprint": free.key, "engine": "transformers"} | change
    row = {"id": "seen-0", "text": "kept", "finished": True, "tokens": 2, "prompt": "p"}
    cell.predictions.mkdir(parents=True)
    free.partial.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    evaluate_cells(run, [(1, "seen")], SLOW)
    assert len(asked) == 6


def test_an_interrupted_evaluation_leaves_nothing_that_counts(
    run: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SLOW.model_copy(update={"batch_size": 1})
    stream = TransformersEngine.stream

    def interrupted(self: Any, requests: Sequence[Request], *others: Any) -> Iterator[tuple[int, Response]]:
        for count, answer in enumerate(stream(self, requests, *others)):
            if count == 4:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_cells(run, [(1, "seen")], config)
    assert [path.name for path in (run / "predictions" / "01").iterdir()] == ["seen.partial.jsonl"]
    kept = read_jsonl(run / "predictions" / "01" / "seen.partial.jsonl")[1:]
    asked.clear()
    evaluate_cells(run, [(1, "seen")], config)
    assert len(kept) == 4 and len(asked) == 2
    rows = {row["id"]: row["response"] for row in predictions(run, 1)}
    assert all(rows[row["id"]] == row["text"] for row in kept)


def test_every_question_is_asked_again_with_its_answer_held_to_the_form(run: Path, asked: list[str]) -> None:
    evaluate_cells(run, [(0, "seen"), (1, "seen")], HELD)
    assert sum(question.endswith("(held)") for question in asked) == 12 and len(asked) == 24
    for stage in (0, 1):
        rows, marker = predictions(run, stage), read_json(run / "predictions" / f"{stage:02d}" / "seen.done.json")
        assert {row["constrained_response"] for row in rows} <= {"Yes", "No", "yes", "no"}
        assert all(row["chance"] == 0.5 for row in rows)
        right = [row["constrained_response"].lower() == row["references"][0] for row in rows]
        assert [row["constrained_score"] for row in rows] == [100 * ok for ok in right]
        share = sum(right) / 6
        assert marker["constrained"]["n"] == 6 and marker["constrained"]["score"] == pytest.approx(100 * share)
        assert marker["constrained"]["known"] == pytest.approx(max(0, 100 * (2 * share - 1)))


def test_free_answers_are_those_without_constraints_and_are_not_asked_again(run: Path, asked: list[str]) -> None:
    evaluate_cells(run, [(1, "seen")], SLOW)
    before = predictions(run, 1)
    assert "constrained_response" not in before[0] and before[0]["constrained_score"] is None
    asked.clear()
    evaluate_cells(run, [(1, "seen")], HELD)
    assert len(asked) == 6 and all(question.endswith("(held)") for question in asked)
    new = ("constrained_response", "constrained_score", "chance")
    assert [{k: v for k, v in row.items() if k not in new} for row in predictions(run, 1)] == [
        {k: v for k, v in row.items() if k not in new} for row in before
    ]
    asked.clear()
    evaluate_cells(run, [(1, "seen")], SLOW)
    assert predictions(run, 1) == before and not asked


def test_it_continues_between_free_and_constrained_answers(
    run: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HELD.model_copy(update={"batch_size": 1})
    stream = TransformersEngine.stream

    def interrupted(self: Any, requests: Sequence[Request], *others: Any) -> Iterator[tuple[int, Response]]:
        for count, answer in enumerate(stream(self, requests, *others)):
            if count == 8:  # all six free ones come first here, then two of the others
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_cells(run, [(1, "seen")], config)
    left = {path.name: len(read_jsonl(path)) - 1 for path in (run / "predictions" / "01").iterdir()}
    assert left == {"seen.partial.jsonl": 6, "seen+constrained.partial.jsonl": 2}
    asked.clear()
    evaluate_cells(run, [(1, "seen")], config)
    assert len(asked) == 4 and all(question.endswith("(held)") for question in asked)
    whole = predictions(run, 1)
    evaluate_cells(run, [(1, "seen")], config, run.parent / "another-cache")
    assert predictions(run, 1) == whole and sorted(p.name for p in (run / "predictions" / "01").iterdir()) == [
        "seen.done.json",
        "seen.jsonl",
    ]


def test_answers_without_the_image_stand_beside_the_true_ones(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, set[tuple[Path, ...]]] = {}
    stream = TransformersEngine.stream

    def spy(self: Any, requests: Sequence[Request], *others: Any) -> Iterator[tuple[int, Response]]:
        for request in requests:
            shown.setdefault(request.prompt[0]["content"], set()).add(tuple(request.images))
        return stream(self, requests, *others)

    monkeypatch.setattr(TransformersEngine, "stream", spy)
    evaluate_cells(run, [(1, "seen")], SLOW.model_copy(update={"image_probe": 4}))
    rows = predictions(run, 1)
    assert sum(row["swapped_score"] is not None for row in rows) == 4
    assert [row["blank_score"] is None for row in rows] == [row["swapped_score"] is None for row in rows]
    assert sorted(len(images) for images in shown.values()) == [1, 1, 3, 3, 3, 3]
    for images in shown.values():
        own = {path for (path,) in images if path.parent.name == "images"}
        blank = [path for (path,) in images if path.parent.name == "blank"]
        assert len(own) == len(images) - len(blank) and len(own) in (1, 2)
        for path in blank:
            with Image.open(path) as grey:
                assert grey.getcolors() == [(grey.width * grey.height, (128, 128, 128))]
                assert grey.size in {(64, 48), (64, 64)}
    marker = read_json(run / "predictions" / "01" / "seen.done.json")["images"]
    probed = [row for row in rows if row["swapped_score"] is not None]
    assert marker["n"] == 4 and marker["true"] == sum(row["score"] for row in probed) / 4


def test_of_a_general_task_the_likelihood_of_its_answers_is_kept(run: Path, asked: list[str]) -> None:
    general = [TaskConfig(name="seen", test="x.json")]
    evaluate_cells(run, [(0, "seen"), (1, "seen")], HELD.model_copy(update={"general": general}))
    assert len(asked) == 12 and not any(question.endswith("(held)") for question in asked)
    found = [read_json(run / "predictions" / f"{stage:02d}" / "seen.done.json")["nll"] for stage in (0, 1)]
    for stage, nll in enumerate(found):
        cell = load_cell(run, stage, "seen", SLOW)
        engine = TransformersEngine([cell.policy], SLOW)
        resume(cell, run.parent / "cache")
        scored = engine.logprobs(list(cell.askings[0].requests.values()))
        tokens = [value for one in scored for value in one.logprobs]
        assert nll == pytest.approx(-sum(tokens) / len(tokens), rel=1e-4)
    assert found[0] != found[1]


def test_a_full_disk_leaves_nothing_that_counts(run: Path) -> None:
    """A limit on the size of files makes writing fail for real, in the middle of the answers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            evaluate_cells(run, [(0, "seen")], SLOW.model_copy(update={"batch_size": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(path.name for path in (run / "predictions" / "00").iterdir() if not path.name.startswith("."))
    assert left == ["seen.partial.jsonl"]
    evaluate_cells(run, [(0, "seen")], SLOW)
    assert len(predictions(run, 0)) == 6


def test_a_full_disk_is_one_line_of_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SLOW.model_copy(update={"batch_size": 1}).model_dump()
    write_json(run / "cells.json", {"cells": [[0, "seen"], [1, "seen"]], "config": config})
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "--cells", str(run / "cells.json")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(SystemExit) as end:
            evaluate.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = "".join(line for line in capsys.readouterr().err.splitlines(True) if line.startswith("error: "))
    place = re.escape(str(run / "predictions"))
    assert re.search(rf"error: {place}: File too large\. Make room and run it again: what is done is kept\n\Z", said)
    assert end.value.code == 2


def test_log_probs_that_are_no_numbers_are_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a proof that has found nothing: only some inputs overflow."""
    config = SLOW.model_copy(update={"general": [TaskConfig(name="seen", test="x.json")]})
    evaluate_cells(run, [(1, "seen")], SLOW)
    logprobs = TransformersEngine.logprobs
    broken = lambda *given: [one._replace(logprobs=[float("nan")]) for one in logprobs(*given)]  # noqa: E731
    monkeypatch.setattr(TransformersEngine, "logprobs", broken)
    with pytest.raises(InputError, match=r"01-seen: (yes|no): log-probabilities of stage 1 are not finite"):
        evaluate_cells(run, [(1, "seen")], config)
    assert len(predictions(run, 1)) == 6


def test_an_adapter_of_another_base_is_refused(run: Path) -> None:
    lora_policy(run / "stages", 2, "foreign", 4, base_hash="f" * 64)
    with pytest.raises(InputError, match=r"02-foreign/serving\.json: base_hash: was made for another base model"):
        evaluate_cells(run, [(2, "seen")], SLOW)


def test_missing_parts_of_a_run_are_named(run: Path) -> None:
    with pytest.raises(InputError, match="stage 7: has not been trained yet"):
        evaluate_cells(run, [(7, "seen")], SLOW)
    with pytest.raises(InputError, match=r"data/nothing/task\.json: no such file"):
        evaluate_cells(run, [(0, "nothing")], SLOW)


def test_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = run / "cells.json"
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "--cells", str(cells)])
    write_json(cells, {"cells": [[0, "seen"]], "config": SLOW.model_dump()})
    evaluate.main()
    assert "stage 0  seen" in capsys.readouterr().out
    write_json(cells, {"cells": [[0, "seen"]], "config": {"engin": "auto"}})
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {cells}: config.engin: Extra inputs are not permitted\n"


def test_the_hash_of_a_model_is_that_of_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in TINY.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    digest = hashing.hash_model(str(TINY))
    assert hashing.hash_model(str(copy)) == digest
    (copy / "README.md").write_text("not loaded")
    assert hashing.hash_model(str(copy)) == digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = hashing.hash_model(str(copy))
    assert changed != digest
    (copy / "chat_template.jinja").write_text("another template")
    assert hashing.hash_model(str(copy)) not in (digest, changed)
    with pytest.raises(InputError, match="no such model folder"):
        hashing.hash_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        hashing.hash_model(str(tmp_path))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"copy: holds no weights in safetensors\. Pickles are never read"):
        hashing.hash_model(str(copy))
