"""Checkpoints as files: whole or absent, verified, pruned. What is in them is in test_resume.py."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from mcit.data_prep.files import read_json, write_json
from mcit.pipeline.stage.checkpoints import Checkpoints, torn


def write(checkpoints: Checkpoints, step: int, text: str = "weights") -> Path:
    place = checkpoints.place(step)
    (place / "inner").mkdir(parents=True)
    (place / "weights").write_text(f"{text} {step}")
    (place / "inner" / "optimizer").write_text(f"optimizer {step}")
    return checkpoints.commit(step, "single", 1)


def newest(checkpoints: Checkpoints, warnings: list[str], unfit: str | None = None) -> Path | None:
    return checkpoints.newest(lambda manifest: unfit, warnings.append)


def test_the_last_two_are_kept_and_the_last_is_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    warnings: list[str] = []
    assert newest(checkpoints, warnings) is None
    for step in (5, 90, 100):
        write(checkpoints, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000090", "00000100"]
    assert newest(checkpoints, warnings) == tmp_path / "00000100" and not warnings
    manifest = read_json(tmp_path / "00000100" / "manifest.json")
    assert (manifest["step"], manifest["mode"], manifest["processes"]) == (100, "single", 1)
    assert set(manifest["files"]) == {"weights", "inner/optimizer"}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: os.truncate(folder / "weights", 3), "weights has 3 bytes of 10"),
        (lambda folder: (folder / "weights").write_text("Weights 10"), "weights is not what was written"),
        (lambda folder: (folder / "inner" / "optimizer").write_text("optimizer 99"), "inner/optimizer is not what"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda folder: os.truncate(folder / "manifest.json", 30), "manifest.json cannot be read"),
        (lambda folder: write_json(folder / "manifest.json", {"step": 10}), "manifest.json cannot be read"),
    ],
)
def test_a_torn_one_is_named_and_the_one_before_taken(tmp_path: Path, damage, named) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10):
        write(checkpoints, step)
    damage(tmp_path / "00000010")
    warnings: list[str] = []
    assert newest(checkpoints, warnings) == tmp_path / "00000009"
    assert len(warnings) == 1 and named in warnings[0] and str(tmp_path / "00000010") in warnings[0]
    write(checkpoints, 10)  # training comes by here again
    assert torn(tmp_path / "00000010") is None


def test_one_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 3)
    warnings: list[str] = []
    assert newest(Checkpoints(tmp_path), warnings, "8 processes wrote it") is None
    assert warnings == [f"{tmp_path / '00000003'}: the checkpoint is not used: 8 processes wrote it"]


def test_a_kill_at_any_moment_of_writing_leaves_the_one_before(tmp_path: Path) -> None:
    """A child is killed before each system call that changes a file; the parent then looks at what is left."""
    write(Checkpoints(tmp_path / "run"), 1)
    calls, steps = 0, set[int]()
    while True:
        calls += 1
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "try")
        if (child := os.fork()) == 0:
            try:
                killed_at_call(calls, "open", "mkdir", "fsync", "replace", "rename", "rmdir", "unlink")
                write(Checkpoints(tmp_path / "try"), 2)
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        checkpoints, warnings = Checkpoints(tmp_path / "try"), list[str]()
        found = newest(checkpoints, warnings)
        assert found is not None and not warnings
        steps.add(int(found.name))
        assert torn(found) is None and (found / "weights").read_text() == f"weights {int(found.name)}"
        checkpoints.clear()
        assert not list((tmp_path / "try").glob(".*"))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert steps == {1, 2} and calls > 8


def killed_at_call(number: int, *names: str) -> None:
    """Have this process killed at the `number`-th call of any of these functions of `os`."""
    left = [number]

    def watched(call):
        def count(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for name in names:
        setattr(os, name, watched(getattr(os, name)))
