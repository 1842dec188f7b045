"""The sequence runner on the real parts: killed, continued, changed, locked. The tiny model learns nothing here."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json, read_jsonl, write_json
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.child import ChildFailed, run_child
from mcit.pipeline.run.locks import holder, locked
from mcit.pipeline.run.runner import perform_steps, show_results, start_run, train_stage
from mcit.pipeline.run.status import read_run, run_status
from mcit.pipeline.run.step import Launch, Step
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.terminal import Terminal

TINY = RECIPES / "mini" / "tiny_vlm"
COLOURS = ("red", "green", "blue", "white")


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- Children and locks -----------------------------------------------------------------------------------------------


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    with locked(tmp_path / "x.lock", "x") as number:
        yield number


def shell(script: str, tmp_path: Path, descriptor: int) -> list[str]:
    """Run a shell script as a child; returns the lines it showed."""
    lines: list[str] = []
    run_child(["sh", "-c", script], tmp_path / "logs" / "x.log", os.environ, lines.append, descriptor)
    return lines


def test_a_child_s_lines_are_shown_and_logged(tmp_path, descriptor):
    assert shell(r"printf 'one\r two\r\n\nthree'; echo four >&2", tmp_path, descriptor) == ["one", "two", "threefour"]
    assert (tmp_path / "logs" / "x.log").read_bytes() == b"one\r two\r\n\nthreefour\n"


def test_bad_input_that_a_child_found_is_passed_on(tmp_path, descriptor):
    with pytest.raises(InputError, match=r"^a\.json: is empty$"):
        shell("echo loading; echo 'error: a.json: is empty'; seq 20; exit 2", tmp_path, descriptor)


def test_bad_input_is_known_through_the_launcher(tmp_path, descriptor):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('error: a.json: is empty', file=sys.stderr); sys.exit(int(sys.argv[1]))")
    command = Launch.named("single").command(script)
    with pytest.raises(InputError, match=r"^a\.json: is empty$"):
        run_child([*command, "2"], tmp_path / "log", os.environ, lambda line: None, descriptor)
    with pytest.raises(ChildFailed) as failure:
        run_child([*command, "1"], tmp_path / "log", os.environ, lambda line: None, descriptor)
    assert str(failure.value).startswith("error: a.json: is empty\nexit code 1;")  # no word of the launcher's own


def test_a_child_that_fails_leaves_its_last_lines_and_the_log(tmp_path, descriptor):
    with pytest.raises(ChildFailed) as failure:
        shell("seq 100; exit 3", tmp_path, descriptor)
    text = str(failure.value)
    assert "\n100\nexit code 3" in text and str(tmp_path / "logs" / "x.log") in text and "\n85\n" not in text


def test_an_interrupt_stops_the_child_and_its_children(tmp_path, descriptor):
    def interrupt(line: str) -> None:
        pids.append(int(line))
        if len(pids) == 2:
            raise KeyboardInterrupt

    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_child(
            ["sh", "-c", "sleep 60 & echo $!; echo $$; wait"], tmp_path / "log", os.environ, interrupt, descriptor
        )
    wait_for(lambda: not any(map(alive, pids)))


PARENT = """
    import os, sys
    from pathlib import Path
    from mcit.pipeline.run.child import run_child
    from mcit.pipeline.run.locks import locked

    folder = Path(sys.argv[1])
    with locked(folder / "x.lock", "step x") as descriptor:
        show = lambda line: (folder / "pid").write_text(line)
        run_child(["sh", "-c", sys.argv[2]], folder / "log", os.environ, show, descriptor)
"""


def start_parent(tmp_path: Path, script: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that holds a lock and runs a child, and the pid that the child printed."""
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), script])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    return parent, int((tmp_path / "pid").read_text())


def test_what_a_killed_run_left_is_stopped_and_waited_for(tmp_path):
    # The child takes a second to stop, and the lock must not be had before that.
    parent, child = start_parent(
        tmp_path, "trap 'sleep 1; exit' TERM; echo $$; exec 2> /dev/null; while :; do sleep 0.1; done"
    )
    assert alive(child)
    parent.kill()
    parent.wait()
    with locked(tmp_path / "x.lock", "step x"):
        assert not alive(child)


def test_a_second_run_is_told_who_holds_the_lock(tmp_path):
    parent, child = start_parent(tmp_path, "echo $$; exec sleep 60")
    try:
        assert holder(tmp_path / "x.lock") == read_json(tmp_path / "x.lock")
        with pytest.raises(InputError, match=f"step x is being done by process {parent.pid} on "):
            with locked(tmp_path / "x.lock", "step x"):
                pass
    finally:
        parent.terminate()
        parent.wait()
    wait_for(lambda: not alive(child))
    assert holder(tmp_path / "x.lock") is None


def test_launchers(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mcit.pipeline.run.step.cores", lambda: 8)
    zero2 = ["--config_file", str(RECIPES / "accelerate" / "zero2.yaml"), "--num_processes", "4"]
    command = Launch.named("zero2", 4).command(Path("sft.py"))
    assert command[3:] == [*zero2, "--num_cpu_threads_per_process", "2", "sft.py"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Launch.named("zero2", 4).command(Path("sft.py"))[3:] == [*zero2, "sft.py"]
    with pytest.raises(InputError, match=r"--launch zerro2: no such launch configuration\. Did you mean `zero2`"):
        Launch.named("zerro2")
    with pytest.raises(InputError, match="starts one process, not 2"):
        Launch.named("single", 2)
    modes = [Launch.named(name, gpus).mode for name, gpus in [("single", 1), ("ddp", 1), ("ddp", 2), ("zero2", 2)]]
    assert modes == ["single", "single", "ddp", "zero2"] and Launch.named("zero3").mode == "zero3"
    with pytest.raises(InputError, match=r"multinode.yaml: is for 2 machines, and this is one"):
        Launch.named("multinode")
    four = Launch.named("multinode", 8, nodes=4)
    assert (four.processes, four.mode) == (32, "ddp")
    assert (Launch.named("ddp").processes, Launch.named("ddp", 3).processes, Launch.named("single").processes) == (
        2,
        3,
        1,
    )


def test_a_launch_that_a_method_does_not_work_under_is_refused_at_once(tmp_path):
    with pytest.raises(
        InputError, match=r"method.moextend: does not run under zero3. It runs under single, ddp, zero2"
    ):
        start_run(load_recipe("mini/moe"), tmp_path / "run", Launch.named("zero3"), quiet())
    with pytest.raises(InputError, match=r"eval.during: does not run under zero3"):
        recipe = load_recipe("mini/sequential", ["eval.during={}"])
        start_run(recipe, tmp_path / "run", Launch.named("zero3"), quiet())
    assert not (tmp_path / "run").exists()


# --- A whole run ------------------------------------------------------------------------------------------------------


def write_data(path: Path, answers: list[str]) -> None:
    """LLaVA JSON with one small picture a sample."""
    rows = []
    for number, answer in enumerate(answers):
        Image.new("RGB", (28, 28 + number), COLOURS[number % 4]).save(path.parent / f"{path.stem}-{number}.png")
        question = "<image>\nWhich colour is it?\nAnswer the question using a single word or phrase."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{path.stem}-{number}.png", "conversations": turns})
    path.write_text(json.dumps(rows))


RECIPE = f"""
name: two
base_model: {{path: {TINY}, dtype: float32}}
stream:
  - {{name: first, train: first.json, test: 0.25, style: short}}
  - {{name: second, train: second.json, test: 0.25, style: short}}
train: {{lora: {{r: 2, alpha: 4, dropout: 0}}, global_batch_size: 2, sft: {{args: {{max_steps: 1}}}}}}
eval: {{engine: transformers, max_new_tokens: 4}}
"""


def write_two(folder: Path) -> Path:
    """The recipe with its two tasks; returns the folder."""
    for name in ("first", "second"):
        write_data(folder / f"{name}.json", [COLOURS[i % 4] for i in range(8)])
    (folder / "two.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A recipe with two tasks, in a folder with a cache of its own."""
    folder = write_two(tmp_path_factory.mktemp("run"))
    (folder / "my_strict_scorer.py").write_text("def never(answer, references, sample):\n    return 0\n")
    before = dict(os.environ)
    os.environ |= {"MCIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    yield folder
    os.environ.clear()
    os.environ.update(before)


def quiet() -> Terminal:
    return Terminal(Console(record=True, file=open(os.devnull, "w"), width=200))


def open_run(folder: Path, *overrides: str, terminal: Terminal | None = None) -> Run:
    return start_run(
        load_recipe(folder / "two.yaml", overrides), folder / "run", Launch.named("single"), terminal or quiet()
    )


def stamps(folder: Path) -> dict[str, int]:
    """When each file that a step made was written; locks and logs say nothing about that."""
    files = (file for file in (folder / "run").rglob("*") if file.is_file() and file.suffix not in (".lock", ".log"))
    return {str(file.relative_to(folder / "run")): file.stat().st_mtime_ns for file in files}


def states(run: Run) -> dict[str, str]:
    return {step["name"]: step["state"] for step in run_status(run)["steps"]}


def start_mcit(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()"]
    return subprocess.Popen([*command, "run", "two.yaml", "--run-dir", "run"], cwd=folder, stdout=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    wait_for(lambda: condition() or process.poll() is not None)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "check settings: interrupted; what is done is kept, the same command"),
        (OSError(errno.ENOSPC, "full"), InputError, "run: No space left on device. Make room and run it again"),
    ],
)
def test_a_run_that_cannot_go_on_says_so_and_how_to_continue(folder, monkeypatch, error, raised, words):
    def fail(*_: object) -> None:
        raise error

    terminal = quiet()
    run = open_run(folder)
    monkeypatch.setattr(run, "perform", fail)
    with pytest.raises(raised) as caught:
        perform_steps(run, run.steps(), terminal)
    assert words in f"{terminal.console.export_text()}{caught.value}"


def test_a_killed_run_continues_from_the_last_finished_step(folder):
    perform_steps(open_run(folder), open_run(folder).preparation(), quiet())
    run = read_run(folder / "run")
    assert states(run)["check"] == "done" and states(run)["train/1"] == "left"

    prepared = stamps(folder)
    kill_when(start_mcit(folder), (folder / "run" / "logs" / "train-1.log").exists)  # inside stage 1
    wait_for(lambda: holder(folder / "run" / "steps" / "train-1.lock") is None)
    assert states(run)["train/1"] == "left"
    assert {name: stamps(folder)[name] for name in prepared} == prepared

    first = folder / "run" / "stages" / "01-first"
    first.mkdir(exist_ok=True)  # as if the kill had come a moment later: a stage without its marker does not count
    (first / "serving.json").write_text("{}")
    (first.parent / ".01-first.partial").mkdir(exist_ok=True)
    (first.parent / "01-renamed").mkdir()
    kill_when(start_mcit(folder), (first / "done.json").exists)  # between stages 1 and 2, or early in 2
    trained = stamps(folder)
    assert states(run)["train/1"] == "done" and states(run)["train/2"] == "left"
    assert sorted(path.name for path in first.parent.glob("*01-*")) == ["01-first"]

    perform_steps(open_run(folder), open_run(folder).steps(), quiet())
    assert set(states(run).values()) == {"done"}
    kept = {name: at for name, at in trained.items() if name.startswith(("stages/00", "stages/01"))}
    assert {name: stamps(folder)[name] for name in kept} == kept and len(kept) > 5


def test_the_files_of_a_finished_run(folder):
    run = folder / "run"
    results = read_json(run / "results.json")
    assert [stage["name"] for stage in results["stages"]] == ["base", "first", "second"]
    assert len(results["matrix"]) == 3 and all(score is not None for row in results["matrix"] for score in row)
    assert results["learned"] == {"first": 1, "second": 2}
    assert (run / "report" / "index.html").exists() and (run / "report" / "matrix.png").exists()
    assert len(read_jsonl(run / "predictions" / "02" / "first.jsonl")) == 2
    assert read_json(run / "status.json")["state"] == "done"
    assert read_json(run / "environment.json")["packages"]["torch"]
    markers = [read_json(run / "stages" / name / "done.json") for name in ("00-base", "01-first", "02-second")]
    assert [marker["policy"] for marker in markers] == results["hashes"]["policies"]
    assert markers[1]["inputs"]["policy"] == markers[0]["policy"] and markers[1]["seconds"] > 0


@pytest.mark.slow
def test_forked_from_one_process_a_run_is_the_same(folder, monkeypatch):
    """Weights and log to the bit, answers to the letter; of two runs, the second is forked from the same processes."""
    monkeypatch.setenv("MCIT_CACHE", str(folder / "another-cache"))  # or the answers would come from the other run
    for name in ("forked", "forked-again"):
        recipe = load_recipe(folder / "two.yaml")
        run = start_run(recipe, folder / name, Launch.named("fork"), quiet())
        perform_steps(run, run.steps(), quiet())
        assert _made(run.dir) == _made(folder / "run")
        shutil.rmtree(folder / "another-cache")


def _made(run: Path) -> dict[str, object]:
    """What a run has made, without times and the base's place."""
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [read_jsonl(path) for path in sorted(run.glob("stages/*/train_log.jsonl"))]
    answers = {str(path.relative_to(run)): path.read_text() for path in run.glob("predictions/*/*.jsonl")}
    results = read_json(run / "results.json")
    assert len(logs) == 2 and len(answers) == 6
    return {
        "logs": [[{key: row[key] for key in row if key not in timed} for row in log] for log in logs],
        "policies": results["hashes"]["policies"],
        "engines": results["engines"],
        **answers,
    }


def test_damaged_results_are_gathered_again(folder):
    path = folder / "run" / "results.json"
    whole = read_json(path)
    path.write_text("{")
    run = open_run(folder)
    perform_steps(run, [run.results()], quiet())
    assert read_json(path) == whole


def test_a_finished_run_has_nothing_to_do(folder):
    before, terminal = stamps(folder), quiet()
    run = open_run(folder, terminal=terminal)
    perform_steps(run, run.steps(), terminal)
    show_results(run, terminal)
    assert stamps(folder) == before
    shown = terminal.console.export_text()
    assert shown.count("nothing to do") == len(run.steps()) and "✓" not in shown
    assert "after stage" in shown and "MFT" in shown and "index.html" in shown


def test_what_is_redone_follows_from_what_changed(folder):
    """By fingerprints alone, without doing it."""

    def left(*overrides: str, launch: str = "single") -> list[str]:
        run = Run(load_recipe(folder / "two.yaml", overrides), folder / "run", Launch.named(launch))
        return [name for name, state in states(run).items() if state == "left"]

    evaluation = ["evaluate", "results", "report"]
    assert left() == left(launch="zero2") == []  # hardware is no part of anything
    for override in ("checkpoint_every=5", "picture_cache=1", "attention=eager"):  # they change no result
        assert left(f"train.{override}") == []
    assert left("name=other") == ["results", "report"]
    assert left("eval.max_new_tokens=5") == evaluation
    assert left("eval.constrained=false") == left("eval.image_probe=2") == evaluation
    assert left("train.rft.args.beta=0.1") == ["settings", "results", "report"]  # no stage is rft
    assert left("stream.second.overrides.lora.r=4") == ["settings", "train/2", *evaluation]
    assert left("stream.first.overrides.lora.r=4") == ["settings", "train/1", "train/2", *evaluation]
    assert left("seed=1") == ["train/1", "train/2", *evaluation]
    assert left("stream.first.test=0.5")[0] == "prepare/first"
    assert left("eval.during={probes: 2}") == ["train/1", "train/2", *evaluation]  # nobody can look into it afterwards


def test_what_a_step_added_is_kept_when_it_is_not_wanted_any_more(tmp_path):
    def step(before: dict, now: dict) -> Step:
        write_json(tmp_path / "m.json", {"fingerprint": hash_json(before), "inputs": before})
        return Step("x", "x", tmp_path / "m.json", lambda: True, lambda: now, lambda *_: {}, extras=("during",))

    plain, asked = {"train": 1}, {"train": 1, "during": {"probes": 2}}
    for before in (plain, asked):
        assert step(before, plain).done() and step(before, plain).changed() == []
        assert not step(before, {"train": 2}).done() and step(before, {"train": 2}).changed() == ["train"]
    more = {"train": 1, "during": {"probes": 3}}
    assert not step(asked, more).done() and step(asked, more).changed() == ["during.probes"]
    assert not step(plain, more).done() and step(plain, more).changed() == ["during.probes"]


def test_changing_one_stage_redoes_it_and_what_follows(folder):
    before, terminal = stamps(folder), quiet()
    write_data(folder / "second.json", ["black"] * 8)
    run = open_run(folder, terminal=terminal)
    perform_steps(run, run.steps(), terminal)
    after = stamps(folder)
    for name in before:
        if name.startswith(("stages/00", "stages/01", "predictions/00/first", "predictions/01/first")):
            assert after[name] == before[name], name
    assert before["stages/02-second/done.json"] < after["stages/02-second/done.json"]
    assert before["predictions/02/first.jsonl"] < after["predictions/02/first.jsonl"]
    assert before["results.json"] < after["results.json"]
    assert (
        "train stage 2/2 second and what follows: again, because this changed: data.second"
        in terminal.console.export_text()
    )


def test_other_test_data_are_no_reason_to_train_again(folder):
    run = open_run(folder, "prepare.limit.test=1")
    perform_steps(run, run.preparation(), quiet())
    left = [name for name, state in states(run).items() if state == "left"]
    assert left == ["evaluate", "results", "report"]


def test_a_stage_trains_the_recipe_it_is_judged_by(folder, monkeypatch):
    """Another command may have put its own recipe into the run directory meanwhile."""
    run = open_run(folder, "seed=9")
    perform_steps(run, run.preparation(), quiet())
    open_run(folder, "seed=10")

    def child(name: str, python: list[str], command: list[str], *_: object, **__: object) -> None:
        raise InputError(f"seed {load_recipe(command[command.index('--recipe') + 1]).seed}")

    monkeypatch.setattr(run, "_child", child)
    with pytest.raises(InputError, match="seed 9"):
        perform_steps(run, run.training(), quiet())


def test_a_step_that_another_process_does_is_left_alone(folder):
    run = open_run(folder, "seed=7")
    perform_steps(run, run.preparation(), quiet())
    step = run.training()[0]
    code = "import sys, time\nfrom pathlib import Path\nfrom mcit.pipeline.run.locks import locked\n"
    code += "with locked(Path(sys.argv[1]), ''):\n print('held', flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run.lock(step))], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        try:
            assert states(run)["train/1"] == "running"
            with pytest.raises(InputError, match=f"train stage 1/2 first of .* being done by process {other.pid}"):
                perform_steps(run, [step], quiet())
        finally:
            other.kill()


def test_a_stage_needs_the_one_before_it(folder):
    run = open_run(folder, "seed=8")
    with pytest.raises(InputError, match="stage 1 is not done"):
        train_stage(run, 2, quiet())
    with pytest.raises(InputError, match="the stream has stages 1 to 2"):
        train_stage(run, 3, quiet())


def test_another_recipe_in_a_run_directory_is_said(folder):
    terminal = quiet()
    open_run(folder, "name=else", terminal=terminal)
    assert "was made by the recipe two: what fits else is kept" in terminal.console.export_text()


# --- Bad input, before anything is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["stream.first.train=nowhere.json"], r"nowhere\.json: stream\.first\.train: no such file"),
        (["stream.first.images=nowhere"], r"nowhere: stream\.first\.images: no such folder"),
        (["base_model.path=./nowhere"], r"nowhere.*: no such model folder"),
        (["train.sft.args.lr_scheduler_type=cosin"], r"train\.sft\.args: .*cosin"),
        (["train.sft.args.learning_rat=1"], r"train\.sft\.args\.learning_rat: .*Did you mean `learning_rate`"),
        (
            ["train.sft.args.per_device_train_batch_size=4"],
            r"train\.global_batch_size: 2 does not divide by 1 process × 4",
        ),
        (["base_model.processor.max_pixel=9"], r"base_model\.processor\.max_pixel: .* Did you mean max_pixels"),
        (["stream.first.scorer=anl"], r"stream\.first: unknown scorer 'anl'\. Did you mean anls"),
        (["stream.first.reward=nowhere:f"], r"stream\.first: nowhere:f: cannot import nowhere"),
        (
            ["stream.first.scorer=my_strict_scorer:never"],
            r"first: sample \d+, '\w+': wrong_\w+: 2 of 2 gold .* not right for the scorer my_strict_scorer:never",
        ),
        (["eval.max_model_len=20"], r"first: test sample .* only 20 fit\. Raise eval\.max_model_len"),
        (["train.max_length=20"], r"first: train sample \d+: has \d+ tokens, images included, but only 20 fit"),
    ],
)
def test_bad_input_is_one_line_before_any_training(folder, overrides, line):
    shutil.rmtree(folder / "bad", ignore_errors=True)
    with pytest.raises(InputError, match=line):
        run = start_run(load_recipe(folder / "two.yaml", overrides), folder / "bad", Launch.named("single"), quiet())
        perform_steps(run, run.preparation(), quiet())
    assert not (folder / "bad" / "data").exists()
