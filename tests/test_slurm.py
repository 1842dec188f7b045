"""Runs as SLURM jobs, as far as it goes without SLURM; tests/test_slurm_cluster.py has a real one."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mcit.data_prep.errors import InputError
from mcit.pipeline import cli
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.terminal import Terminal
from mcit.pipeline.run.vllm_server import serve_rollouts
from mcit.slurm import cluster, status
from mcit.slurm.cluster import JobState
from mcit.slurm.jobs import Job, Submitted, jobs_of, left_of, sweep_job, write_submitted
from mcit.slurm.profile import Profile, Site, read_profile
from mcit.slurm.script import write_script
from mcit.slurm.submit import Submission, plan_submissions

RECIPE = f"""
name: two
base_model: {{path: {RECIPES / "mini" / "tiny_vlm"}, dtype: float32}}
stream: [{{name: first, train: first.jsonl}}, {{name: second, train: second.jsonl}}]
eval: {{cells: seen}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "two.yaml").write_text(RECIPE)
    return Run(load_recipe(tmp_path / "two.yaml"), tmp_path / "a run", Launch.named("single"))


# --- The site ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("modlues: [cuda]", "modlues: unknown key. Did you mean `modules`?"),
        ("jobs: {trian: {mem: 1G}}", "jobs.trian: unknown key. Did you mean `train`?"),
        ("sbatch: {nodes: 4}", "sbatch.nodes: is set by mcit. Use the command line: --nodes, --gpus-per-node"),
        ("jobs: {eval: {requeue: true}}", "jobs.eval.requeue: is set by mcit. Jobs are stopped and queued again by"),
        ("modules: cuda", "modules: Input should be a valid list"),
        ("environment: {A: {b: 1}}", "environment.A"),
        ("restarts: -1", "restarts: Input should be greater than or equal to 0"),
        ("- modules", "is not a mapping of keys. Known here: container, environment, jobs, modules"),
        ("sbatch: {mem: 1, mem: 2}", "the key `mem` is given twice"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_with_the_key(tmp_path, text, line):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(InputError) as refusal:
        read_profile(tmp_path / "site.yaml")
    assert line in str(refusal.value) and "site.yaml" in str(refusal.value)


def test_what_each_kind_of_job_asks_for():
    profile = Profile(sbatch={"account": "a", "mem": 0}, jobs={"prepare": {"partition": "cpu", "mem": None}})
    site = Site(profile, {"partition": "gpu", "time": "1:00:00"}, nodes=4, gpus=8)
    common = {"ntasks-per-node": 1, "account": "a", "time": "1:00:00"}
    assert site.sbatch("train") == {"nodes": 4, "gpus-per-node": 8, **common, "partition": "gpu", "mem": 0}
    assert site.sbatch("eval") == {"nodes": 1, "gpus-per-node": 1, **common, "partition": "gpu", "mem": 0}
    assert site.sbatch("prepare") == {"nodes": 1, **common, "partition": "cpu", "mem": None}
    assert "gpus-per-node" not in site.sbatch("report")
    assert "gpus-per-node" not in Site(Profile(jobs={"train": {"gres": "gpu:8"}}), {}, gpus=8).sbatch("train")
    assert "gpus-per-node" not in Site(Profile(), {}, gpus=0).sbatch("eval")


def test_how_stages_are_started(tmp_path):
    def training(**settings) -> list[str]:
        return Site(Profile(), {}, **settings).training

    assert training() == [] == training(gpus=0)
    assert training(gpus=2) == ["--launch", "ddp", "--gpus", "2"]
    assert training(gpus=0, nodes=2) == ["--launch", "ddp", "--gpus", "1", "--nodes", "2"]
    assert training(gpus=8, nodes=4, launch="zero2") == ["--launch", "zero2", "--gpus", "8", "--nodes", "4"]
    assert Site(Profile(), {}, gpus=8, nodes=4).launcher.processes == 32
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'\nnum_processes: 1")
    assert training(launch=str(own)) == ["--launch", str(own), "--gpus", "1"]
    with pytest.raises(InputError, match="starts one process, not 8"):
        training(gpus=8, launch="single")


def test_nodes_meet_where_the_job_says(monkeypatch):
    launch = Launch.named("zero2", 8, 4)
    for variable in ("SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match="SLURM_NODEID is not set, and 4 nodes need it to meet"):
        launch.command(Path("sft.py"))
    for variable, value in {"SLURM_NODEID": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "15001"}.items():
        monkeypatch.setenv(variable, value)
    told = " ".join(launch.command(Path("sft.py")))
    assert launch.rank == 3 and "--num_processes 32" in told
    assert "--num_machines 4 --machine_rank 3 --main_process_ip node1 --main_process_port 15001" in told
    assert Launch.named("ddp", 2).rank == 0  # whatever the environment says


# --- The graph --------------------------------------------------------------------------------------------------------


def graph(run: Run) -> dict[str, tuple[str, ...]]:
    return {job.name: job.after for job in jobs_of(run, [])}


def test_a_stage_is_evaluated_beside_the_training_of_the_next(run):
    assert graph(run) == {
        "prepare": (),
        "train-1": ("prepare",),
        "eval-1": ("train-1",),
        "train-2": ("train-1",),
        "eval-2": ("train-2",),
        "report": ("eval-1", "eval-2"),
    }
    run.recipe.eval = run.recipe.eval.model_copy(update={"cells": "full"})
    assert graph(run)["eval-0"] == ("prepare",) and graph(run)["report"] == ("eval-0", "eval-1", "eval-2")
    run.recipe.eval = run.recipe.eval.model_copy(update={"cells": "last"})
    assert "eval-1" not in graph(run) and graph(run)["report"] == ("eval-2",)


def test_what_a_job_does(run):
    jobs = {job.name: job for job in jobs_of(run, ["--launch", "zero2", "--gpus", "8"])}
    assert jobs["prepare"].command == 'prepare "$run"'
    assert jobs["train-2"].command == 'train "$run" --stage 2 --launch zero2 --gpus 8'
    assert (jobs["eval-1"].command, jobs["report"].command) == ('eval "$run" --stage 1', 'eval "$run"')
    assert [step.name for step in jobs["report"].steps] == ["evaluate", "results", "report"]
    steps = {step.name for job in jobs.values() for step in job.steps}
    assert steps == {step.name for step in run.steps(rows=[1, 2])}  # each is somebody's


RFT = ["train.paradigm=rft", "train.rft.args.beta=0.04", "train.rft.rollout.engine=server"]


def test_a_stage_that_asks_a_server_has_a_node_more_for_it(run, tmp_path):
    """Unless the recipe names a server."""
    run.recipe = load_recipe(tmp_path / "two.yaml", RFT)
    site = Site(Profile(vllm={"gpu-memory-utilization": 0.8}), {}, nodes=2, gpus=8)
    job = {job.name: job for job in jobs_of(run, site.training)}["train-2"]
    text = write_script(run.dir, "two", job, [], site).read_text()
    assert "#SBATCH --nodes=3\n" in text and "--gpus 8 --nodes 2 &\n" in text
    assert "MCIT_ROLLOUT_URL=http://$(address_of 3):$port/v1\n" in text
    assert "\nsrun --nodes=1 --ntasks=1 --relative=2 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+" in text
    serving = 'rollouts "$run" --stage 2 --host 0.0.0.0 --port "$port"'
    assert f"    {serving} --data-parallel-size=8 --gpu-memory-utilization=0.8 &\nserver=$!\n" in text
    assert "\nsrun --nodes=2 --ntasks=2 --relative=0 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0

    halves: dict[str, Any] = {"tensor-parallel-size": 4, "data-parallel-size": 2}
    assert Site(Profile(vllm=halves), {}, gpus=8).vllm == halves and Site(Profile(), {}, gpus=0).vllm == {}
    run.recipe = load_recipe(tmp_path / "two.yaml", [*RFT, "train.rft.rollout.url='http://a/v1'"])
    assert not any(job.serving for job in jobs_of(run, []))


@pytest.mark.parametrize(
    ("overrides", "stage", "line"),
    [
        ([], None, "train.rft.rollout.engine: no stage asks a vLLM server. Only engine: server asks one"),
        (RFT, 3, "two: --stage: the stream has stages 1 to 2"),
        (RFT, 2, "a run: is not prepared. First: `mcit prepare "),
    ],
)
def test_a_server_that_nobody_could_use_is_not_started(run, tmp_path, overrides, stage, line):
    run.recipe = load_recipe(tmp_path / "two.yaml", overrides)
    with pytest.raises(InputError) as refusal:
        serve_rollouts(run, stage, "127.0.0.1", 8000, [], Terminal())
    assert line in str(refusal.value)


def test_what_comes_after_something_left_is_left(run):
    jobs = jobs_of(run, [])
    assert left_of(jobs) == {job.name for job in jobs}
    done = dataclasses.replace(jobs[0].steps[0], inputs=lambda: {}, there=lambda: True)
    done.marker.parent.mkdir(parents=True)
    done.marker.write_text('{"fingerprint": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}')
    all_but = [dataclasses.replace(job, steps=job.steps if job.name == "eval-1" else (done,)) for job in jobs]
    assert left_of(all_but) == {"eval-1", "report"}


# --- The scripts ------------------------------------------------------------------------------------------------------


def test_a_script(run):
    profile = Profile(
        srun={"container-image": "/i.sqsh"}, modules=["cuda/12.4"], environment={"HF_HOME": "/a b"}, restarts=3
    )
    site = Site(profile, {"time": "1:00:00"}, nodes=2, gpus=8)
    job = {job.name: job for job in jobs_of(run, site.training)}["train-2"]
    text = write_script(run.dir, "two", job, [], site).read_text()
    head, body = text.split("\n\n", 1)
    assert head.splitlines()[:3] == [
        "#!/bin/bash",
        "# two, train-2: train stage 2/2 second. Written by `mcit submit`.",
        "#SBATCH --job-name=two.train-2",
    ]
    options = {"--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--requeue", "--signal=B:USR1@120"}
    options |= {"--kill-on-invalid-dep=yes", "--open-mode=append", f"'--output={run.dir}/slurm/train-2.%j.out'"}
    assert options <= {line.removeprefix("#SBATCH ") for line in head.splitlines()}
    assert "module load cuda/12.4\nexport HF_HOME='/a b'\n" in body
    assert f"run='{run.dir}'\njob=$SLURM_JOB_ID\n" in body
    assert "srun --kill-on-bad-exit=1 --container-image=/i.sqsh ${SLURM_CPUS_PER_TASK:+" in body
    assert f"{sys.executable} -P -m mcit.pipeline.cli \\\n" in body
    assert '\n    train "$run" --stage 2 --launch ddp --gpus 8 --nodes 2 &\n' in body
    assert "export MASTER_ADDR MASTER_PORT" in body and "< 3 ))" in body
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_script_of_an_array_finds_its_run(run):
    job, site = jobs_of(run, [])[0], Site(Profile(container="apptainer exec 'my image.sif'"), {}, nodes=2)
    text = write_script(run.dir, "two", job, ["seed-0", "seed 7"], site).read_text()
    assert "MASTER_ADDR" not in text and "#SBATCH --nodes=1\n" in text  # only training takes several nodes
    assert "apptainer exec 'my image.sif' mcit \\\n" in text and "prepare.%A_%a.out" in text
    lines = text[text.index("runs=(") :].splitlines()[:3]
    env = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "12", "SLURM_JOB_ID": "12"}
    told = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'echo "$run|$job"'])], env=env, capture_output=True, text=True
    )
    assert told.stdout == f"{run.dir}/seed 7|12_1\n"


# --- What is submitted ------------------------------------------------------------------------------------------------


def plan(left: dict[str, str], queued: dict[str, dict[str, str]] | None = None) -> list[tuple[str, str]]:
    """(job, options) of a plan for runs with the jobs p → t → r, of which `left` names those that are."""
    after = {"p": (), "t": ("p",), "r": ("t",)}
    jobs = {run: [Job(name, "train", "", "", after[name], ()) for name in after] for run in left}
    queued = {run: {} for run in left} | (queued or {})
    made = plan_submissions(jobs, {run: set(names) for run, names in left.items()}, queued, len(left) > 1)
    return [(each.job.name, " ".join(each.options)) for each in made]


def test_a_run_is_submitted_in_order():
    assert plan({"": "ptr"}) == [("p", ""), ("t", "--dependency=afterok:<p>"), ("r", "--dependency=afterok:<t>")]
    assert plan({"": "r"}) == [("r", "")] and plan({"": ""}) == []


def test_what_is_queued_is_left_alone_and_waited_for():
    assert plan({"": "tr"}, {"": {"t": "8"}}) == [("r", "--dependency=afterok:8")]
    assert plan({"": "tr"}, {"": {"t": "8", "r": "9"}}) == []


def test_several_runs_are_arrays_each_member_after_its_own():
    assert plan({"a": "ptr", "b": "ptr"}) == [
        ("p", "--array=0,1"),
        ("t", "--array=0,1 --dependency=aftercorr:<p>"),
        ("r", "--array=0,1 --dependency=aftercorr:<t>"),
    ]
    # a's training is done, b's is queued, c has everything before it: no member may wait for another's job
    assert plan({"a": "r", "b": "tr", "c": "ptr"}, {"b": {"t": "5_1"}}) == [
        ("p", "--array=2"),
        ("t", "--array=2 --dependency=aftercorr:<p>"),
        ("r", "--array=0"),
        ("r", "--array=1 --dependency=afterok:5_1"),
        ("r", "--array=2 --dependency=aftercorr:<t>"),
    ]


def test_runs_with_fewer_stages_share_what_they_can(run):
    one_stage = [job for job in jobs_of(run, []) if job.name in ("prepare", "train-1", "eval-1")]
    last = dataclasses.replace(jobs_of(run, [])[-1], after=("eval-1",))
    jobs = {"short": [*one_stage, last], "long": jobs_of(run, [])}
    left = {name: {job.name for job in each} for name, each in jobs.items()}
    made = plan_submissions(jobs, left, {"short": {}, "long": {}}, True)
    assert [(each.job.name, list(each.runs)) for each in made] == [
        ("prepare", [0, 1]),
        ("train-1", [0, 1]),
        ("eval-1", [0, 1]),
        ("train-2", [1]),
        ("eval-2", [1]),
        ("report", [0]),
        ("report", [1]),
    ]


def test_the_results_of_a_sweep_wait_for_all_its_runs():
    report = Submission(Job("report", "report", "", "", (), ()), (), {0: "a", 1: "b"}, is_array=True, id="7")
    assert Submission(sweep_job(), (report, "3_2")).options == ["--dependency=afterok:7,afterok:3_2"]


# --- Where jobs are ---------------------------------------------------------------------------------------------------


def notes(tmp_path: Path, monkeypatch, **states: JobState) -> tuple[dict[str, str], str]:
    """What is said of jobs a → b → c, of which those that have started left a log."""
    after = {"a": [], "b": ["a"], "c": ["b"]}
    jobs = {name: Submitted(id=name, after=after[name], steps=[], log=str(tmp_path / f"{name}.out")) for name in after}
    write_submitted(tmp_path, jobs)
    monkeypatch.setattr(status, "states", lambda ids: states)
    listed, remark = status.job_status(tmp_path, Path("sweep"))
    assert [job["state"] for job in listed] == [states[n].state if n in states else None for n in after]
    return {job["name"]: job["note"] for job in listed}, remark


def test_a_job_waits_for_what_is_not_done(tmp_path, monkeypatch):
    waiting = JobState("PENDING", "Dependency")
    said, remark = notes(tmp_path, monkeypatch, a=JobState("RUNNING"), b=waiting, c=waiting)
    assert said == {"a": "", "b": "after a", "c": "after b"} and remark == ""
    said, _ = notes(tmp_path, monkeypatch, a=JobState("COMPLETED"), b=JobState("PENDING", "Resources"), c=waiting)
    assert said == {"a": "", "b": "Resources", "c": "after b"}


def test_a_job_that_never_started_names_the_one_that_failed(tmp_path, monkeypatch):
    never = JobState("CANCELLED", "DependencyNeverSatisfied")
    (tmp_path / "a.out").write_text("")
    said, remark = notes(tmp_path, monkeypatch, a=JobState("TIMEOUT"), b=never, c=JobState("CANCELLED"))
    assert said == {
        "a": f"see {tmp_path}/a.out",
        "b": "never started: a is TIMEOUT",
        "c": "never started: a is TIMEOUT",
    }
    assert remark == "jobs did not end well; `mcit submit sweep` submits what is left"
    said, remark = notes(tmp_path, monkeypatch, a=JobState("FAILED"), b=JobState("PENDING", never.reason))
    assert said["b"] == "never started: a is FAILED" and remark  # even if SLURM leaves it in the queue


def test_a_job_that_slurm_has_forgotten_has_no_state(tmp_path, monkeypatch):
    assert notes(tmp_path, monkeypatch) == ({"a": "", "b": "", "c": ""}, "")


def test_what_slurm_and_accounting_say(tmp_path, monkeypatch):
    """Their commands in the forms that they print: SLURM itself is in test_slurm_cluster.py, accounting is not."""
    said = {
        "squeue": "1|RUNNING|None\n2_0|PENDING|Dependency\n9|PENDING|None",
        "sacct": "3|CANCELLED by 1000\n4|COMPLETED",
    }
    for name, text in said.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cluster.states(["1", "2_0", "3", "4", "5"]) == {
        "1": JobState("RUNNING"),
        "2_0": JobState("PENDING", "Dependency"),
        "3": JobState("CANCELLED"),
        "4": JobState("COMPLETED"),
    }
    (tmp_path / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1")
    assert cluster.states(["1", "3"]) == {"1": JobState("RUNNING")}


def test_without_slurm_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments, line in (
        (["submit", "mini/sequential"], "sbatch: no such command here. Use a machine that submits to a SLURM cluster"),
        (["cancel", "nowhere"], "nowhere: has no SLURM jobs"),
    ):
        monkeypatch.setattr(sys, "argv", ["mcit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {line}")
    assert not any(tmp_path.iterdir())


def test_jobs_can_be_looked_at_without_slurm(tmp_path, monkeypatch):
    write_submitted(tmp_path, {"a": Submitted(id="1", after=[], steps=[], log="")})
    monkeypatch.setenv("PATH", str(tmp_path))
    listed, remark = status.job_status(tmp_path, tmp_path)
    assert listed[0]["id"] == "1" and listed[0]["state"] is None
    assert remark.startswith("what SLURM says is not known: squeue: no such command here")
    assert cluster.states([]) == {}


# --- Being asked to stop ----------------------------------------------------------------------------------------------

CHILD = """
    import signal, sys, time
    def say(number, frame):
        print(signal.Signals(number).name, flush=True)
        sys.exit(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, say)
    print("up", flush=True)
    time.sleep(600)
"""
PARENT = """
    import os, sys
    from mcit.pipeline import cli
    from mcit.pipeline.run.child import run_child
    command = [sys.executable, "-c", sys.argv[2]]
    cli.app = lambda: run_child(command, __import__("pathlib").Path(sys.argv[1]), os.environ, print)
    cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_command_that_is_asked_to_stop_stops_its_child_and_exits_75(tmp_path, number):
    """SLURM sends USR1 to every process of a step: the child must not hear it, the command stops it by TERM."""
    arguments = [textwrap.dedent(PARENT), str(tmp_path / "log"), textwrap.dedent(CHILD)]
    with subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        assert parent.stdout.readline() == b"up\n"
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True)
        for pid in [*map(int, children.stdout.split()), parent.pid]:
            os.kill(pid, signal.SIGUSR1 if pid != parent.pid else number)
        code, said = parent.wait(300), parent.stderr.read().decode()
    assert code == 75 and said == f"stopped by {number.name}; the same command goes on from here\n"
    assert (tmp_path / "log").read_text() == "up\nSIGTERM\n"
