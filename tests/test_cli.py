"""The `mcit` command: what it prints, how it exits, and that it is quick where it can be."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcit.data_prep.errors import not_written
from mcit.pipeline import cli
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe, write_recipe
from mcit.pipeline.recipe.text import parse_yaml
from mcit.pipeline.run import doctor
from mcit.pipeline.run.terminal import condensed
from mcit.pipeline.verbs.runs import found

COMMANDS = [
    "run",
    "prepare",
    "train",
    "eval",
    "judge",
    "report",
    "plan",
    "publish",
    "export",
    "submit",
    "cancel",
    "status",
    "methods",
    "doctor",
    "metrics",
    "score",
    "judge-data",
    "agreement",
    "show",
    "asd",
    "verify",
]


@pytest.fixture
def mcit(monkeypatch, capsys):
    """Calls the entry point with arguments; returns (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mcit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return (int(code) if code else 0, *capsys.readouterr())

    return call


def test_help_lists_every_command(mcit):
    code, out, _ = mcit("--help")
    assert code == 0
    assert [name for name in COMMANDS if re.search(rf"│ {name} ", out)] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(mcit, command):
    code, out, _ = mcit(command, "--help")
    assert code == 0 and f"Example: mcit {command}" in out


def test_help_and_metrics_do_not_import_torch(tmp_path):
    (tmp_path / "m.json").write_text('{"matrix": [[1]]}')
    code = "import sys; from mcit.pipeline import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    for arguments in (["--help"], ["metrics", "m.json"], ["run", "mini/sequential", "--print-config"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr


def test_metrics(mcit, tmp_path):
    (tmp_path / "m.json").write_text('{"matrix": [[80, 0], [60, 90]]}')
    code, out, _ = mcit("metrics", tmp_path / "m.json")
    found = json.loads(out)
    assert code == 0 and (found["MFT"], found["MFN"], found["BWT"], found["FWT"]) == (85, 75, -20, None)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(mcit, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Is it red? Answer yes or no.", "completion": "Yes"}')
    code, _, err = mcit("asd", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert code == 2 and err.startswith("error: No space left on device. Make room") and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


WITHOUT_ROOM = """
import resource, sys
import torch
from safetensors.torch import save_file
from mcit.data_prep.errors import not_written

tensor = torch.zeros(100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    save_file({"a": tensor}, sys.argv[2]) if sys.argv[1] == "safetensors" else torch.save(tensor, sys.argv[2])
except Exception as error:
    print(not_written(error, "here"))
"""


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_weights_for_which_there_is_no_room_are_one_line(library, tmp_path):
    """Neither library raises an `OSError`."""
    command = [sys.executable, "-c", WITHOUT_ROOM, library, tmp_path / "weights"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"here: (File too large|No space left on device)\. Make room and run it again: .*\n", out)


def test_a_folder_that_cannot_be_written_is_one_line(mcit, tmp_path, monkeypatch):
    make = Path.mkdir

    def closed(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "closed":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", closed)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Is it red? Answer yes or no.", "completion": "Yes"}')
    code, _, err = mcit("asd", tmp_path / "in.jsonl", tmp_path / "closed" / "out.jsonl")
    assert (
        code == 2
        and err == f"error: {tmp_path}/closed: Read-only file system. Look at its permissions, or name another place\n"
    )


def test_other_errors_keep_their_traceback():
    for error in (OSError(errno.EIO, "I/O error"), RuntimeError("no room for doubt"), ValueError()):
        with pytest.raises(type(error)) as caught:
            not_written(error)
        assert caught.value is error


def test_score(mcit, tmp_path):
    lines = [{"id": 1, "response": "B", "references": ["B"]}, {"id": 2, "response": "C", "references": ["B"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = mcit("score", "mcq", tmp_path / "p.jsonl", "--per-sample", tmp_path / "s.jsonl")
    found = json.loads(out)
    assert code == 0 and (found["score"], found["n"]) == (50, 2)
    assert [json.loads(line)["score"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [100, 0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["metrics", "nowhere.json"], "error: nowhere.json: no such file\n"),
        (["run", "mini/sequential", "trian.x=1"], "error: command line: trian: unknown key. Did you mean `train`?\n"),
        (["run", "mini/sequentia"], "error: mini/sequentia: no such recipe. Did you mean `mini/sequential`?\n"),
        (
            ["run", "my.yaml"],
            "error: my.yaml: no such file. Name a recipe file, a packaged recipe, or a run's folder\n",
        ),
        (["run", "mini/sequential", "--launch", "zero7"], None),
        (["status", "nowhere"], None),
        (["report", "nowhere"], None),
        (["score", "mqc", "p.jsonl"], None),
    ],
)
def test_bad_input_exits_2_with_one_line(mcit, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = mcit(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert line in (None, err)
    assert not any(tmp_path.iterdir()), "something was written before the input was refused"


@pytest.mark.parametrize("arguments", [["run"], ["train", "mini/sefe"], ["nothing"], ["show", "mini/sefe", "-n", "0"]])
def test_wrong_usage_exits_2(mcit, arguments):
    code, _, err = mcit(*arguments)
    assert code == 2 and "Traceback" not in err


def test_an_interrupt_exits_130(mcit, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mcit.eval.metrics.metrics_file", interrupt)
    assert mcit("metrics", "m.json")[0] == 130


@pytest.mark.parametrize(
    ("recipe", "methods", "expected"),
    [
        ("mini/sequential", [], "runs/mini-sequential"),
        ("mini/sequential", ["sefe", "gere"], "runs/mini-sequential-sefe-gere"),
        ("mini/sequential", [str(RECIPES / "methods" / "ewc.yaml")], "runs/mini-sequential-ewc"),
        ("mini/sequential", ["mcit.pipeline.methods.l2:L2"], "runs/mini-sequential-mcit-pipeline-methods-l2-L2"),
    ],
)
def test_a_run_with_a_method_added_has_a_folder_of_its_own(recipe, methods, expected):
    assert str(found(recipe, None, methods, None, "single", None)[1]) == expected
    assert found(recipe, None, methods, Path("x"), "single", None)[1] == Path("x")


def test_print_config_says_what_each_stage_resolves_to(mcit, tmp_path):
    arguments = ["mini/sequential", "stream.spatial.overrides.lora.r=4", "--print-config"]
    code, out, _ = mcit("run", *arguments)
    recipe, stages = yaml.safe_load_all(out)
    assert code == 0
    assert [stage["train"]["lora"]["r"] for stage in stages] == [12, 12, 4, 12, 12]
    assert [stage["name"] for stage in stages] == ["digits", "counting", "spatial", "grounding", "arithmetic"]
    (tmp_path / "again.yaml").write_text(out.split("---")[0])
    assert load_recipe(tmp_path / "again.yaml") == load_recipe("mini/sequential", arguments[1:2])
    assert recipe["base_model"]["path"] == str(RECIPES / "mini" / "tiny_vlm")


def test_methods(mcit):
    code, out, _ = mcit("methods", "--json")
    found = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert found["reglora"]["keeps"] == "nothing" and "2505.02486" in found["reglora"]["paper"]
    assert list(found["sefe"]["expands_to"]) == ["asd", "reglora"]
    lines = mcit("methods")[1].splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names == list(found), "a name runs into what stands behind it"
    settings = [parse_yaml(line, "") for line in lines if line.strip().startswith("{")]
    assert settings == [row["settings"] for row in found.values() if "settings" in row], (
        "they can be pasted into a recipe"
    )


def test_status_of_a_run_that_has_not_begun(mcit, tmp_path):
    write_recipe(load_recipe("mini/sequential"), tmp_path / "recipe.yaml")
    code, out, _ = mcit("status", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0 and found["state"] == "left" and {step["state"] for step in found["steps"]} == {"left"}
    assert "train stage 3/5 spatial" in mcit("status", tmp_path)[1]


def test_asd_of_a_file(mcit, tmp_path, monkeypatch):
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    rows = [{"id": str(i), "prompt": f"Which is it, {i}?", "completion": f"word{i % 7}"} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = mcit("asd", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--fraction", "0")
    assert code == 0 and "0 of 40" in out, err
    code, out, err = mcit("asd", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--fraction", "0.5", "--seed", "3")
    assert (code, err) == (0, "")
    converted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in converted] == [row["id"] for row in rows]
    assert sum("asd" in row["meta"] for row in converted) == 20 and "20 of 40" in out
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["summary"] in out


def test_doctor_says_what_is_missing_and_what_to_do(mcit, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKED", {"torch": "2.13.0", "pydantic": "0.0.1"})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(doctor, "_import_error", lambda module: "No module named 'x'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = mcit("doctor", "--json")
    found = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and found["torch"]["ok"]
    assert not found["pydantic"]["ok"] and "pydantic==0.0.1" in found["pydantic"]["remedy"]
    assert not found["Hub"]["ok"] and not found["deepspeed"]["ok"]
    assert re.search(r"^no +pydantic .*→ pip install pydantic==0\.0\.1", mcit("doctor")[1], re.MULTILINE)


def test_an_import_that_fails_is_told_in_one_line():
    assert doctor._import_error("json") is None
    assert doctor._import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_versions_that_doctor_wants_are_those_that_are_installed():
    files = [Path(cli.__file__).parents[1] / name for name in ("constraints.txt", "constraints-gpu.txt")]
    pinned = dict(line.split("==") for file in files for line in file.read_text().splitlines() if "==" in line)
    assert {name: pinned.get(name) for name in doctor.CHECKED | doctor.OPTIONAL} == doctor.CHECKED | doctor.OPTIONAL


def test_progress_lines_are_condensed():
    assert condensed("{'loss': '0.51', 'grad_norm': '4.4', 'epoch': '0.5'}") == "loss 0.51  epoch 0.5"
    assert condensed("{'train_runtime': '1', 'train_loss': '6.2'}") is None
    assert condensed("120 of 300 answers") == "120 of 300 answers"
    assert condensed("[transformers] The tokenizer has new tokens") is None
    assert condensed("/usr/lib/x.py:3: FutureWarning: old") is None
