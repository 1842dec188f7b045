"""What must hold against others: no code from models, no pickles, no secrets in files, no shell, no archive tricks.

What must not be published is in tests/test_publish.py, what is not taken from a published stage in tests/test_start.py.
"""

import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from random_model import RANDOM
from safetensors.torch import load_file

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.places import settle
from mcit.data_prep.schema import TaskConfig
from mcit.eval.engines.base import load_processor as serving_processor
from mcit.eval.serving import Serving
from mcit.pipeline import cli
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import ModelConfig
from mcit.pipeline.run.child import ChildFailed, run_child
from mcit.pipeline.run.locks import locked
from mcit.pipeline.run.redaction import redact
from mcit.pipeline.stage.entering import load_model, load_processor
from mcit.pipeline.training.arguments import check_stage

TOKEN = "hf_" + "a1B2" * 9


# --- Code and pickles -------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model that asks for code of its own to be run, and the file that the code would write."""
    folder, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(RANDOM, folder)
    code = f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    config = read_json(folder / "config.json")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil")
    write_json(folder / "config.json", config | {"model_type": "evil", "auto_map": auto})
    processor = read_json(folder / "processor_config.json")
    write_json(folder / "processor_config.json", processor | {"processor_class": "Evil", "auto_map": auto})
    return folder, trace


def test_a_model_s_own_code_is_not_run_unless_it_is_asked_for(hostile):
    folder, trace = hostile
    base = ModelConfig(path=str(folder), dtype="float32")
    assert not base.trust_remote_code
    serving = Serving(stage=0, name="base", kind="base", base=str(folder), base_hash="h", hash="h")
    assert not serving.trust_remote_code
    for load in (lambda: load_model(base), lambda: load_processor(base), lambda: serving_processor(serving)):
        with pytest.raises(Exception, match=r"trust_remote_code|custom code|does not recognize|no processor"):
            load()
        assert not trace.exists()


def test_a_model_in_pickles_is_not_read(tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(RANDOM, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(ModelConfig(path=str(folder), dtype="float32"))

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(trace),))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OSError, match="safetensors"):
        load_model(ModelConfig(path=str(folder), dtype="float32"))
    assert not trace.exists()


# --- Secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", [f"train.sft.args.run_name={TOKEN}", f"name={TOKEN}", f"data=/x/{TOKEN}"])
def test_a_recipe_with_a_secret_is_refused_and_the_secret_not_said(override, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mcit", "run", "mini/sequential", override, "--print-config"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "holds a token of the Hub. Secrets come from the environment" in err
    assert TOKEN not in out + err


def test_trainer_arguments_that_publish_or_take_a_token_are_the_pipeline_s():
    for key in ("hub_token", "push_to_hub", "hub_model_id"):
        stage = load_recipe("mini/sequential", [f"train.sft.args.{key}=x"]).stages[0]
        with pytest.raises(InputError, match=f"train.sft.args.{key}: is set by the pipeline"):
            check_stage(stage)


def test_secrets_are_redacted_from_logs_and_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    script = f"printf 'loading with correct-horse-'; sleep 0.1; echo battery; echo {TOKEN} >&2; exit 3"
    shown: list[str] = []
    with locked(tmp_path / "x.lock", "x") as lock, pytest.raises(ChildFailed) as failure:
        run_child(["sh", "-c", script], tmp_path / "x.log", os.environ, shown.append, lock)
    for text in ((tmp_path / "x.log").read_text(), "".join(shown), str(failure.value)):
        assert "loading with [redacted]" in text and text.count("[redacted]") == 2
        assert TOKEN not in text and "battery" not in text
    assert redact("a tokenizer, hf_hub_download, sk-learn") == "a tokenizer, hf_hub_download, sk-learn"


# --- Shells and archives ----------------------------------------------------------------------------------------------


def test_values_never_reach_a_shell_unquoted(tmp_path):
    """A job's script, run by a real shell, with a run directory, modules and variables that are commands."""
    from mcit.pipeline.run.step import Launch
    from mcit.pipeline.run.steps import Run
    from mcit.slurm.jobs import jobs_of
    from mcit.slurm.profile import Profile, Site
    from mcit.slurm.submit import write_script

    evil = "a'; touch ran; echo '$(touch ran2) `touch ran3`"
    folder = tmp_path / evil
    profile = Profile(modules=[evil], environment={"VALUE": evil})
    run = Run(load_recipe("mini/sequential"), folder, Launch.named("single"))
    site = Site(profile, {}, nodes=1, gpus=0)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "module"):
        (tools / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$0" "$@" >> {tmp_path}/asked\n')
        (tools / name).chmod(0o755)
    job = {job.name: job for job in jobs_of(run, site.training)}["train-1"]
    script = write_script(folder, "two", job, [], site)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    asked = (tmp_path / "asked").read_text()
    assert str(folder) in asked and evil in asked, done.stderr  # as one argument, as it is
    assert not list(tmp_path.rglob("ran*"))


@pytest.mark.parametrize(
    "name", ["../out.png", "/tmp/out.png", "a/../../out.png", "..\\out.png", "C:\\out.png", "link"]
)
def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("good.png", b"x")
        entry = zipfile.ZipInfo(name)
        if name == "link":
            entry.external_attr = 0o120777 << 16
        archive.writestr(entry, b"/etc/passwd")
    task = TaskConfig(name="t", train="train.json", images=str(tmp_path / "images.zip"))
    with pytest.raises(InputError, match=r"images\.zip: images: holds (a link, link|.*which leads out of it)"):
        settle(task, tmp_path, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["cache", "images.zip"], ["images.zip"])
    assert not list((tmp_path / "cache").rglob("*.png"))
