"""Runs as jobs of a real SLURM with two nodes. A stand-in for `mcit` plays what a job may do; some run the real one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import MISSING, WHY_NOT, slurm_cluster, wait_for

from mcit.data_prep.files import read_json, write_jsonl
from mcit.pipeline import cli
from mcit.pipeline.recipe.layers import RECIPES
from mcit.slurm.cluster import states
from mcit.slurm.jobs import read_submitted

pytestmark = [pytest.mark.system, pytest.mark.skipif(bool(MISSING), reason=WHY_NOT)]

# Called as `mcit VERB RUN [--stage K] …`: leaves a line in RUN/seen when it starts, then does what RUN/<verb>-<k>.sh
# says, or nothing.
STAND_IN = """#!/bin/bash
[ "$4" ] && name=$2-$5 || name=$2
echo "$name on $SLURMD_NODENAME, restart ${SLURM_RESTART_COUNT:-0}" >> "$3/seen"
[ ! -f "$3/$name.sh" ] || . "$3/$name.sh"
"""
# Works until it is asked to stop, and the second time not at all.
UNTIL_ASKED = """
[ "$SLURM_RESTART_COUNT" ] && exit
trap 'exit 75' USR1 TERM
echo "works" >> "$3/seen"
while :; do sleep 0.1; done
"""
RECIPE = f"""
name: two
base_model: {{path: {RECIPES / "mini" / "tiny_vlm"}, dtype: float32}}
stream: [{{name: first, train: first.jsonl, test: 0.25}}, {{name: second, train: second.jsonl, test: 0.25}}]
train: {{lora: {{r: 2, alpha: 4, dropout: 0}}, global_batch_size: 2, sft: {{args: {{max_steps: 1}}}}}}
eval: {{engine: transformers, cells: seen, max_new_tokens: 4}}
"""
Mcit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """A cluster, and an environment in which commands and jobs find it."""
    before = dict(os.environ)
    with slurm_cluster() as conf:
        cache = {"MCIT_CACHE": str(conf.parent / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"SLURM_CONF": str(conf), **cache}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def folder(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the recipe `two.yaml`, its data, and the profile `stand-in.yaml`; the current one."""
    for task in ("first", "second"):
        rows = [(f"Repeat the word: {word}{n}", f"{word}{n}") for n in range(4) for word in ("red", "blue")]
        turns = [({"role": "user", "content": ask}, {"role": "assistant", "content": say}) for ask, say in rows]
        write_jsonl(tmp_path / f"{task}.jsonl", [{"prompt": [ask], "completion": [say]} for ask, say in turns])
    (tmp_path / "two.yaml").write_text(RECIPE)
    (tmp_path / "stand-in.sh").write_text(STAND_IN)
    (tmp_path / "stand-in.yaml").write_text(f"container: bash {tmp_path}/stand-in.sh\n")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    subprocess.run(["scancel", f"--user={os.getuid()}"], check=True)
    wait_for(lambda: not queue(), 300)


@pytest.fixture
def mcit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mcit:
    """Calls the command; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mcit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


def submit(mcit: Mcit, *arguments: object) -> str:
    code, out, err = mcit("submit", "two.yaml", "--run-dir", "run", "--gpus-per-node", "0", *arguments)
    assert code == 0, err
    return out


def stand_in(mcit: Mcit, *arguments: object) -> str:
    return submit(mcit, "--profile", "stand-in.yaml", *arguments)


def told(run: str = "run") -> dict[str, str]:
    """The state of each job."""
    jobs = {name: job["id"] for name, job in read_submitted(Path(run)).items()}
    found = states(jobs.values())
    return {name: found[id].state for name, id in jobs.items()}


def wait_until(expected: dict[str, str], run: str = "run", seconds: float = 300) -> None:
    """Wait until the jobs named are in the states given; say where they are if they do not get there."""
    try:
        wait_for(lambda: expected.items() <= told(run).items(), seconds)
    except AssertionError:
        raise AssertionError(f"{told(run)} instead of {expected}") from None


def wait_until_all(state: str, run: str = "run", seconds: float = 300) -> None:
    wait_until(dict.fromkeys(read_submitted(Path(run)), state), run, seconds)


def seen(run: str = "run") -> list[str]:
    """What the stand-in left."""
    path = Path(run, "seen")
    return path.read_text().splitlines() if path.exists() else []


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout


def job_field(run: str, job: str, field: str) -> str:
    """One of the fields that `scontrol show job` prints."""
    return re.search(rf"\b{field}=(\S+)", scontrol("show", "job", read_submitted(Path(run))[job]["id"])).group(1)  # type: ignore[union-attr]


# --- The real thing ---------------------------------------------------------------------------------------------------


def test_a_stream_is_submitted_asked_to_stop_and_finished(folder, mcit):
    """USR1 to the job's shell is what SLURM sends before the time limit: the stage stops, queues again, and is done."""
    out = submit(mcit, "--gpus-per-node", "1", "--time", "10")
    assert re.search(r"train-2 +\| \d+ +\| train-1 ", out) and re.search(r"report +\| \d+ +\| eval-1, eval-2 ", out)
    wait_for((folder / "run" / "logs" / "train-1.log").exists, 600)
    _, out, _ = mcit("status", "run")
    assert re.search(
        r"^running train stage 1/2 first  process \d+ on \S+ since \S+  job \d+ RUNNING$", out, re.MULTILINE
    )
    assert re.search(r"^left    evaluate stage 1  job \d+ PENDING \(after train-1\)$", out, re.MULTILINE)
    subprocess.run(["scancel", "--batch", "--signal=USR1", read_submitted(Path("run"))["train-1"]["id"]], check=True)
    wait_for(lambda: job_field("run", "train-1", "Restarts") == "1", 300)

    wait_until_all("COMPLETED", seconds=1200)
    log = next((folder / "run" / "slurm").glob("train-1.*.out")).read_text()
    assert log.index("stopped by SIGUSR1; the same command goes on") < log.index("asked to stop: queued again")
    assert log.index("asked to stop: queued again") < log.index("✓ train stage 1/2 first")  # one log for both
    assert job_field("run", "eval-1", "StartTime") < job_field("run", "train-2", "EndTime")  # beside each other
    assert "gpu:1" in job_field("run", "eval-1", "TresPerNode")
    assert {step["state"] for step in json.loads(mcit("status", "run", "--json")[1])["steps"]} == {"done"}
    assert [[score is None for score in row] for row in read_json("run/results.json")["matrix"]] == [
        [True, True],
        [False, True],
        [False, False],
    ]

    assert submit(mcit) == "nothing to submit: all is done\n"
    (folder / "run" / "stages" / "02-second" / "done.json").unlink()
    planned = [Path(line.split()[-1]).stem for line in submit(mcit, "--dry-run").splitlines()]
    assert planned == ["train-2", "eval-2", "report"]


@pytest.mark.slow
def test_the_whole_mini_stream(folder, mcit):
    """A packaged recipe as it is but for the numbers of samples: five tasks, every cell of the matrix, vLLM."""
    limits = ("prepare.limit.train=16", "prepare.limit.test=8")
    code, _, err = mcit("submit", "mini/sequential", *limits, "--run-dir", "mini", "--gpus-per-node", "0")
    assert code == 0, err
    wait_until_all("COMPLETED", "mini", seconds=2400)
    matrix = read_json("mini/results.json")["matrix"]
    assert len(matrix) == 6 and all(len(row) == 5 and None not in row for row in matrix)
    assert Path("mini/report/index.html").exists()
    starts = {name: job_field("mini", name, "StartTime") for name in read_submitted(Path("mini"))}
    assert all(starts[f"eval-{k}"] <= job_field("mini", f"train-{k + 1}", "EndTime") for k in range(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "zero2"])
def test_a_stage_on_two_nodes(folder, mcit, launch):
    submit(mcit, "eval.cells=last", "--nodes", "2", "--launch", launch)
    wait_until_all("COMPLETED", seconds=1800)
    assert job_field("run", "train-1", "NodeList") == "one,two"
    trained = [read_json(f"run/stages/{name}/trained.json") for name in ("01-first", "02-second")]
    assert [(each["mode"], each["processes"]) for each in trained] == [(launch, 2)] * 2
    assert (folder / "run" / "logs" / "train-2-node-1.log").exists()


@pytest.mark.slow
def test_seeds_side_by_side(folder, mcit):
    submit(mcit, "eval.cells=last", "--run-dir", "seeds", "--seeds", "0,7")
    wait_until_all("COMPLETED", "seeds", seconds=1800)  # the job that gathers
    results = [read_json(f"seeds/seed-{seed}/results.json") for seed in (0, 7)]
    assert [each["seed"] for each in results] == [0, 7]
    assert results[0]["hashes"]["policies"][1] != results[1]["hashes"]["policies"][1]
    assert len(read_json("seeds/results.json")["runs"]) == 2 and Path("seeds/report/index.html").exists()


# --- What can happen to a job -----------------------------------------------------------------------------------------


def test_a_job_that_fails_and_what_never_starts_after_it(folder, mcit):
    Path("run/train-1.sh").write_text("echo 'error: it went wrong'; exit 2")
    stand_in(mcit)
    wait_until({"prepare": "COMPLETED", "train-1": "FAILED"} | dict.fromkeys(("eval-1", "report"), "CANCELLED"))
    out = mcit("status", "run")[1]
    log = read_submitted(Path("run"))["train-1"]["log"]
    assert re.search(rf"train stage 1/2 first  job \d+ FAILED \(see {log}\)", out)
    assert "error: it went wrong" in Path(log).read_text() and "queued again" not in Path(log).read_text()
    assert re.search(r"report  job \d+ CANCELLED \(never started: train-1 is FAILED\)", out)
    assert "jobs did not end well; `mcit submit run` submits what is left" in out

    Path("run/train-1.sh").unlink()
    before = told()
    stand_in(mcit)
    wait_until_all("COMPLETED")
    assert "FAILED" in before.values() and seen().count("train-1 on one, restart 0") == 2


def test_what_is_queued_is_not_submitted_twice_and_others_wait_for_it(folder, mcit):
    Path("run/train-1.sh").write_text(UNTIL_ASKED)
    Path("run/prepare.sh").write_text(UNTIL_ASKED)
    stand_in(mcit)
    first = {name: job["id"] for name, job in read_submitted(Path("run")).items()}
    assert stand_in(mcit) == "nothing to submit: all that is left is queued\n"
    code, _, err = mcit("submit", "two.yaml", "seed=3", "--run-dir", "run", "--profile", "stand-in.yaml")
    assert code == 2 and "are queued or running, for another recipe" in err and "mcit cancel" in err
    subprocess.run(["scancel", first["eval-2"]], check=True)  # by hand: the report never starts then
    wait_until({"eval-2": "CANCELLED", "report": "CANCELLED"})
    out = stand_in(mcit)
    assert re.search(rf"eval-2 +\| \d+ +\| job {first['train-2']} ", out)
    assert re.search(rf"report +\| \d+ +\| job {first['eval-1']}, eval-2 ", out)
    assert job_field("run", "report", "Dependency").count("afterok") == 2


def test_cancelled_jobs_stay_so(folder, mcit):
    """A job that is cancelled is asked to stop like one that is to queue again, and must not."""
    Path("run/train-1.sh").write_text(UNTIL_ASKED)
    stand_in(mcit)
    wait_for(lambda: "works" in seen(), 300)
    _, out, _ = mcit("cancel", "run")
    assert [line.split(",")[0] for line in out.splitlines()] == [
        f"cancelled run: {name}" for name in ("train-1", "eval-1", "train-2", "eval-2", "report")
    ]
    wait_until(dict.fromkeys(("train-1", "eval-1", "train-2", "eval-2", "report"), "CANCELLED"))
    assert "queued again" not in Path(read_submitted(Path("run"))["train-1"]["log"]).read_text()
    assert mcit("cancel", "run")[1] == "nothing is queued or running\n"


def test_a_job_does_not_queue_again_for_ever(folder, mcit):
    Path("run/prepare.sh").write_text(UNTIL_ASKED)
    Path("stand-in.yaml").write_text(Path("stand-in.yaml").read_text() + "restarts: 0\n")
    stand_in(mcit)
    wait_for(lambda: "works" in seen(), 300)
    subprocess.run(["scancel", "--batch", "--signal=USR1", read_submitted(Path("run"))["prepare"]["id"]], check=True)
    wait_until({"prepare": "FAILED", "train-1": "CANCELLED"})
    assert "asked to stop after 0 restarts" in Path(read_submitted(Path("run"))["prepare"]["log"]).read_text()


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_goes_on(folder, mcit):
    """SLURM's own signal. It comes up to a minute early, so that the least limit is three minutes."""
    Path("run/train-1.sh").write_text(UNTIL_ASKED)
    stand_in(mcit, "--time", "3")
    wait_until_all("COMPLETED", seconds=600)
    assert [line for line in seen() if line.startswith("train-1")][1].endswith("restart 1")
    assert job_field("run", "train-1", "Restarts") == "1"


def test_a_node_that_fails_alone_is_no_reason_to_queue_again(folder, mcit):
    """srun stops the others then, which say what a job says that was asked to stop."""
    Path("run/train-1.sh").write_text('[ "$SLURM_NODEID" = 0 ] || exit 1\n' + UNTIL_ASKED)
    stand_in(mcit, "--nodes", "2")
    wait_until({"train-1": "FAILED", "report": "CANCELLED"})
    log = Path(read_submitted(Path("run"))["train-1"]["log"]).read_text()
    assert "Exited with exit code 75" in log and "queued again" not in log


def test_a_job_makes_room_and_goes_on(folder, mcit):
    """Preemption: SLURM asks with TERM, and waits for as long as the partition's grace time."""
    Path("run/train-1.sh").write_text(UNTIL_ASKED)
    Path("stand-in.yaml").write_text(Path("stand-in.yaml").read_text() + "sbatch: {exclusive: true}\n")
    stand_in(mcit, "--nodes", "2")
    wait_for(lambda: "works" in seen(), 300)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap", f"date >> {folder}/urgent"], check=True)
    wait_until_all("COMPLETED")
    assert "asked to stop: queued again" in Path(read_submitted(Path("run"))["train-1"]["log"]).read_text()
    assert Path("urgent").exists() and job_field("run", "train-1", "Restarts") == "1"


@pytest.mark.parametrize("event", ["drain", "down"])
def test_a_node_goes_in_the_middle(folder, mcit, event):
    """A node that is drained finishes its job and gets no other; one that is lost has its job done elsewhere."""
    Path("run/train-1.sh").write_text('[ "$SLURM_RESTART_COUNT" ] || until [ -f "$3/go" ]; do sleep 0.1; done')
    stand_in(mcit)
    wait_for(lambda: any(line.startswith("train-1") for line in seen()), 300)
    node = job_field("run", "train-1", "NodeList")
    other = {"one": "two", "two": "one"}[node]
    scontrol("update", f"nodename={node}", f"state={event}", "reason=test")
    try:
        Path("run/go").touch()
        wait_until_all("COMPLETED")
    finally:
        scontrol("update", f"nodename={node}", "state=resume")
    trained = [line for line in seen() if line.startswith("train-1")]
    expected = [f"train-1 on {node}, restart 0", *([f"train-1 on {other}, restart 1"] if event == "down" else [])]
    assert trained == expected
    assert f"train-2 on {other}, restart 0" in seen()


def test_an_array_of_seeds_in_which_one_fails(folder, mcit):
    Path("run/seed-1").mkdir()
    Path("run/seed-1/train-1.sh").write_text("exit 1")
    stand_in(mcit, "--seeds", "0,1,5")
    wait_until_all("COMPLETED", "run/seed-0")
    wait_until_all("COMPLETED", "run/seed-5")
    wait_until(
        {"prepare": "COMPLETED", "train-1": "FAILED", "train-2": "CANCELLED", "report": "CANCELLED"}, "run/seed-1"
    )
    wait_until({"sweep": "CANCELLED"})
    out = mcit("status", "run")[1]
    assert re.search(r"seed-0  0 of \d+ steps  0.0 s$", out, re.MULTILINE)
    assert re.search(r"seed-1  0 of \d+ steps  0.0 s  jobs: 4 CANCELLED, 1 FAILED$", out, re.MULTILINE)
    assert "jobs did not end well; `mcit submit run` submits what is left" in out
    assert "never started: train-1 is FAILED" in mcit("status", "run/seed-1")[1]
    assert {job["id"].split("_")[0] for job in read_submitted(Path("run/seed-0")).values()} == {
        job["id"].split("_")[0] for job in read_submitted(Path("run/seed-1")).values()
    }

    Path("run/seed-1/train-1.sh").unlink()
    stand_in(mcit, "--seeds", "0,1,5")
    wait_until_all("COMPLETED", "run/seed-1")
    wait_until({"sweep": "COMPLETED"})
    assert seen()[-1].startswith("run on ")


def test_a_member_of_an_array_queues_again_alone(folder, mcit):
    for seed in (0, 1):
        Path(f"run/seed-{seed}").mkdir()
        Path(f"run/seed-{seed}/prepare.sh").write_text(UNTIL_ASKED)
    stand_in(mcit, "--seeds", "0,1")
    wait_for(lambda: all("works" in seen(f"run/seed-{seed}") for seed in (0, 1)), 300)
    for seed in (0, 1):  # one after the other, so that whichever has the bare id of the array is among them
        id = read_submitted(Path(f"run/seed-{seed}"))["prepare"]["id"]
        subprocess.run(["scancel", "--batch", "--signal=USR1", id], check=True)
        wait_for(lambda: len(seen(f"run/seed-{seed}")) >= 3, 300)  # noqa: B023
    for seed in (0, 1):
        wait_until_all("COMPLETED", f"run/seed-{seed}")
        starts = [line for line in seen(f"run/seed-{seed}") if line.startswith("prepare")]
        assert [line.split(", ")[1] for line in starts] == ["restart 0", "restart 1"]


RFT = ("train.paradigm=rft", "train.reference=none", "train.rft.args.beta=0", "train.rft.rollout.engine=server")
FOR_EVER = "while :; do sleep 0.1; done\n"


def test_a_node_that_answers_for_the_one_that_trains(folder, mcit):
    """A server of the job's own, found and unlocked by what the job says, which goes when the training ends."""
    Path("run/rollouts-1.sh").write_text('echo "process $$" >> "$3/seen"\n' + FOR_EVER)
    Path("run/train-1.sh").write_text('echo "$MCIT_ROLLOUT_URL ${#VLLM_API_KEY}" >> "$3/seen"; sleep 1')
    Path("run/rollouts-2.sh").write_text(FOR_EVER)
    stand_in(mcit, *RFT)
    wait_until_all("COMPLETED")
    assert job_field("run", "train-1", "NodeList") == "one,two"
    assert {"rollouts-1 on two, restart 0", "train-1 on one, restart 0"} <= set(seen())
    [address] = [line for line in seen() if line.startswith("http")]
    assert re.fullmatch(r"http://127\.0\.0\.1:3[01]\d{3}/v1 36", address)
    [process] = [line.split()[1] for line in seen() if line.startswith("process")]
    wait_for(lambda: not Path("/proc", process).exists(), 60)


def test_a_job_queues_again_with_its_server_and_fails_with_it(folder, mcit):
    Path("run/rollouts-1.sh").write_text(FOR_EVER)
    Path("run/train-1.sh").write_text(UNTIL_ASKED)
    Path("run/rollouts-2.sh").write_text("echo 'error: no memory'; exit 2")
    Path("run/train-2.sh").write_text("trap 'exit 75' USR1 TERM\n" + FOR_EVER)
    stand_in(mcit, *RFT)
    wait_for(lambda: "works" in seen(), 300)
    subprocess.run(["scancel", "--batch", "--signal=USR1", read_submitted(Path("run"))["train-1"]["id"]], check=True)
    wait_until({"train-1": "COMPLETED", "eval-1": "COMPLETED", "train-2": "FAILED", "report": "CANCELLED"})
    assert {"rollouts-1 on two, restart 1", "train-1 on one, restart 1"} <= set(seen())
    log = Path(read_submitted(Path("run"))["train-2"]["log"]).read_text()
    assert "error: no memory" in log and "queued again" not in log


@pytest.mark.slow
def test_vllm_on_one_node_answers_for_training_on_the_other(folder, mcit):
    pytest.importorskip("vllm")
    args = "train.rft.args={beta: 0, max_steps: 2, num_generations: 2, max_completion_length: 4, temperature: 1.5}"
    submit(mcit, *RFT, args, "train.lora.r=4", "eval.cells=last")
    wait_until_all("COMPLETED", seconds=1800)
    for k, name in ((1, "01-first"), (2, "02-second")):
        trained = read_json(f"run/stages/{name}/trained.json")
        assert (trained["rollouts"]["engine"], trained["rollouts"]["sent"]) == ("server", 2)
        assert "Application startup complete" in Path(f"run/logs/rollouts-{k}.log").read_text()
    assert not list(Path("run/stages").glob(".*"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--partition", "nowhere"], "sbatch: invalid partition specified: nowhere; "),
        (["--time", "soon"], "sbatch: Invalid --time specification"),
        (["--profile", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["trian.x=1"], "trian: unknown key. Did you mean `train`?"),
        (["--nodes", "3", "--gpus-per-node", "1"], "train.global_batch_size: 2 does not divide by 3 processes"),
        (["--seeds", "1,x"], "sweep.seed.1: Input should be a valid integer, not 'x'"),
    ],
)
def test_what_cannot_be_submitted_is_one_line_and_nothing_is(folder, mcit, arguments, line):
    code, out, err = mcit("submit", "two.yaml", "--run-dir", "run", "--gpus-per-node", "0", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert not read_submitted(Path("run")) and not queue()


def test_a_submission_that_is_refused_in_the_middle_is_taken_back(folder, mcit):
    Path("run/prepare.sh").write_text(UNTIL_ASKED)
    Path("stand-in.yaml").write_text(Path("stand-in.yaml").read_text() + "jobs: {eval: {partition: nowhere}}\n")
    code, _, err = mcit("submit", "two.yaml", "--run-dir", "run", "--gpus-per-node", "0", "--profile", "stand-in.yaml")
    sent = re.search(r"invalid partition specified: nowhere; .*\. The jobs before it are cancelled: (\d+), (\d+)$", err)
    assert code == 2 and sent
    assert not read_submitted(Path("run"))
    wait_for(lambda: not queue(), 300)


def test_a_profile_reaches_the_jobs(folder, mcit):
    profile = "environment: {GREETING: 'good day'}\nsbatch: {cpus-per-task: 3}\nsrun: {export: ALL}\n"
    Path("stand-in.yaml").write_text(Path("stand-in.yaml").read_text() + profile)
    Path("run/prepare.sh").write_text('echo "$GREETING, $SLURM_CPUS_PER_TASK CPUs" >> "$3/seen"')
    stand_in(mcit)
    wait_until({"prepare": "COMPLETED"})
    assert "good day, 3 CPUs" in seen()
