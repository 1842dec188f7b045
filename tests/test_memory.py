"""Memory: of samples that are prepared, converted or verified, decisions are held, never the samples."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcit.data_prep.asd.conversion import convert
from mcit.data_prep.asd.rules import Rules
from mcit.data_prep.files import write_jsonl
from mcit.data_prep.prepare import drop_samples, iter_samples, prepare_task, read_task
from mcit.data_prep.sample_file import SampleFile
from mcit.data_prep.schema import LimitConfig, PrepareConfig, TaskConfig
from mcit.pipeline.data_tools.verify import verify

LONG = "word " * 1000  # a sample that is held costs 5,000 bytes at least
FEW, MANY = 200, 600
LITTLE = 500  # bytes


def rows(path: Path, count: int) -> Path:
    given = {"style": "number"}  # to infer it, two thousand samples are held
    numbers = range(count)
    write_jsonl(path, ({"id": f"s{n}", "prompt": f"{LONG}{n}?", "completion": str(n % 30), **given} for n in numbers))
    return path


def growth(work: Callable[[int], Any]) -> float:
    """Bytes by which the peak grows with each sample more."""
    peaks = []
    for count in (FEW, FEW, MANY):  # the first run fills caches
        tracemalloc.start()
        work(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[2] - peaks[1]) / (MANY - FEW)


def prepare(root: Path, count: int, **limit: int) -> Path:
    task = TaskConfig(name="t", train=str(rows(root / f"{count}.jsonl", count)))
    settings = PrepareConfig(limit=LimitConfig(**limit))
    cache = root / f"cache-{count}-{len(list(root.iterdir()))}"
    return prepare_task(task, settings, seed=0, asd=None, base_dir=root, cache=cache)


def test_preparing_holds_no_samples(tmp_path: Path) -> None:
    assert growth(lambda count: prepare(tmp_path, count)) < LITTLE
    assert growth(lambda count: prepare(tmp_path, count, train=count // 2)) < LITTLE


def test_dropping_holds_no_samples(tmp_path: Path) -> None:
    folders = {count: prepare(tmp_path, count) for count in (FEW, MANY)}

    def drop(count: int) -> None:
        first = next(iter_samples(folders[count], "train"))["id"]
        left = drop_samples(folders[count], {"train": {first}}, "a test", tmp_path / "cache")
        assert read_task(left)["counts"]["train"] == read_task(folders[count])["counts"]["train"] - 1

    assert growth(drop) < LITTLE


def test_converting_holds_what_is_converted_alone(tmp_path: Path) -> None:
    folders = {count: prepare(tmp_path, count) for count in (FEW, MANY)}

    def one_in_a_hundred(count: int) -> None:
        done = convert(SampleFile(folders[count] / "train.jsonl"), 0.01, 0, Rules())
        assert len(done.converted) == round(0.01 * len(done.before))
        assert sum(1 for _ in done.after()) == len(done.before)

    assert growth(one_in_a_hundred) < LITTLE


def test_verifying_holds_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))

    def look(count: int) -> None:
        with verify([str(rows(tmp_path / f"{count}.jsonl", count))]) as found:
            assert found.findings.problems == [] and found.scans[0].samples["train"] == count

    assert growth(look) < LITTLE
