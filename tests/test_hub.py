"""Data on the Hub: pinned, only what is named is fetched, and offline is one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, serve

from mcit.data_prep import hub
from mcit.data_prep.errors import InputError
from mcit.data_prep.hub import download, is_hub, is_pinned, pin, same_dataset
from mcit.pipeline.recipe.loading import load_recipe, write_recipe
from mcit.pipeline.run.runner import _pin_data

FIXTURES = Path(__file__).parent / "fixtures"
PROGRAM = """
import sys
from pathlib import Path
from mcit.data_prep.errors import InputError
from mcit.data_prep.hub import pin
from mcit.data_prep.prepare import prepare_task, read_task
from mcit.data_prep.schema import PrepareConfig, TaskConfig

data, home = sys.argv[1], Path(sys.argv[2])
try:
    pinned = pin(data)
    train, test = (f"Geometry3K/data/{part}-*.parquet" for part in ("train", "test"))
    task = TaskConfig(name="g", data=pinned, layout="geometry3k", train=train, test=test, style="latex")
    folder = prepare_task(task, PrepareConfig(), seed=0, asd=None, base_dir=home, cache=home / "cache")
    print(pinned, read_task(folder)["counts"]["train"])
except InputError as error:
    print(f"error: {error}")
"""


def run(data: str, home: Path, endpoint: str) -> str:
    """What the real client does against `endpoint`, in a process of its own, since it reads it when imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", PROGRAM, data, str(home)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_dataset_is_pinned_fetched_in_part_and_there_offline(tmp_path):
    with serve("acme/geometry", FIXTURES / "rft7") as (endpoint, sent):
        assert run("hub:acme/geometry", tmp_path, endpoint) == f"hub:acme/geometry@{COMMIT} 2"
        assert sorted(sent) == [f"Geometry3K/data/{part}-00000-of-00001.parquet" for part in ("test", "train")]
    # the server is gone: what was fetched is still there
    assert run("hub:acme/geometry", tmp_path, endpoint) == f"hub:acme/geometry@{COMMIT} 2"
    assert run(f"hub:acme/geometry@{COMMIT}", tmp_path, endpoint).endswith(" 2")
    refused = run("hub:acme/geometry", tmp_path / "elsewhere", endpoint)
    assert refused.startswith("error: hub:acme/geometry: data: could not be had from the Hub (")
    assert "give a local folder" in refused


def test_only_named_files_and_folders_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download("hub:acme/d@v1", ["train.json", "images"]) == tmp_path
    assert asked["allow_patterns"] == ["train.json", "train.json/**", "images", "images/**"]
    assert (asked["hub_id"], asked["repo_type"], asked["revision"]) == ("acme/d", "dataset", "v1")


def test_places(monkeypatch):
    assert is_hub("hub:a/b") and not is_hub("/data") and not is_hub(None)
    assert is_pinned("hub:a/b@main") and not is_pinned("hub:a/b") and same_dataset("hub:a/b@1", "hub:a/b")
    assert pin(f"hub:a/b@{COMMIT}") == f"hub:a/b@{COMMIT}"  # without asking
    with pytest.raises(InputError, match=r"hub:nothing: data: is no dataset on the Hub. Write hub:owner/name"):
        pin("hub:nothing")


def test_a_run_keeps_to_the_commit_that_it_began_with(monkeypatch, tmp_path):
    commits = iter("12")
    monkeypatch.setattr(hub, "_snapshot", lambda hub_id, revision, patterns: tmp_path / (next(commits) * 40))
    recipe = load_recipe("ctbench/stream", ["data=hub:acme/ct"])
    _pin_data(recipe, tmp_path / "run")
    assert {task.data for task in recipe.tasks} == {f"hub:acme/ct@{'1' * 40}"}  # asked once for all tasks
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    again = load_recipe("ctbench/stream", ["data=hub:acme/ct"])
    _pin_data(again, tmp_path / "run")
    assert again.tasks == recipe.tasks
    assert load_recipe(tmp_path / "run").tasks == recipe.tasks
    other = load_recipe("ctbench/stream", ["data=hub:acme/ct"])
    _pin_data(other, tmp_path / "new-run")
    assert other.tasks[0].data == f"hub:acme/ct@{'2' * 40}"
