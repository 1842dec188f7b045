"""Published layouts: every recipe prepares from rows in the original format, and every field lands where it belongs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcit.data_prep.files import read_jsonl, write_jsonl
from mcit.data_prep.forms import final_answer
from mcit.data_prep.layouts import layout_names, load_layout
from mcit.data_prep.mini import tasks as mini
from mcit.data_prep.places import settle
from mcit.data_prep.prepare import prepare_task, read_samples, read_task
from mcit.data_prep.readers import read_rows
from mcit.data_prep.schema import AsdConfig, PrepareConfig, Sample, TaskConfig
from mcit.eval.results import read_results
from mcit.eval.scoring import check_gold
from mcit.pipeline.data_tools.convert import convert_file
from mcit.pipeline.data_tools.show import read_stage
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.probes import load_probe
from mcit.pipeline.reinforcement.rewards import Rewards, stated
from mcit.pipeline.training.arguments import check_stage, try_config

FIXTURES = Path(__file__).parent / "fixtures"
STREAMS = ("coin", "ucit", "dcl", "ctbench", "rft7")
PACKAGED = sorted(
    str(file.relative_to(RECIPES).with_suffix("")) for s in STREAMS for file in (RECIPES / s).glob("*.yaml")
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixtures, with the variants of CoIN whose files differ from its own in the folder's name alone."""
    root = shutil.copytree(FIXTURES, tmp_path_factory.mktemp("data") / "fixtures")
    coin = root / "coin"
    shutil.copytree(coin / "Instructions_Original", coin / "Instructions_Diverse")
    for task in (coin / "Instructions_Original").iterdir():
        asd = coin / "annotations" / task.name
        asd.mkdir(exist_ok=True)
        test = next(file for file in task.iterdir() if file.name in ("test.json", "val.json"))
        shutil.copyfile(test, asd / "test.json")
        for x in ("ori", "x10", "x20", "x40", "x60", "x80"):
            if not (asd / f"train_{x}.json").exists():
                shutil.copyfile(task / "train.json", asd / f"train_{x}.json")
    return root


def prepared(recipe: str, benchmarks: Path, cache: Path, task: str = "") -> dict[str, Path]:
    """The prepared folder of each task of a recipe, or of one."""
    loaded = load_recipe(recipe, [f"data={benchmarks / recipe.partition('/')[0]}"])
    return {
        config.name: prepare_task(config, loaded.prepare, seed=0, asd=None, base_dir=Path(loaded.folder), cache=cache)
        for config in loaded.tasks
        if config.name.startswith(task)
    }


def first(folder: Path, part: Any, at: int = 0) -> Sample:
    return read_samples(folder, part)[at]


def said(sample: Sample) -> tuple[str, str]:
    return sample["prompt"][-1]["content"], sample["completion"][0]["content"]


# --- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*(f"{stream}/stream" for stream in STREAMS), "mini/sequential", "mini/rft-think"])
def test_gold_answers_earn_all_that_can_be_earned(recipe, benchmarks, cache, monkeypatch):
    """Of every training sample: the right form, and as much accuracy as the best of its references."""
    if recipe.startswith("mini/"):
        monkeypatch.setattr(mini, "SIZES", {task: dict.fromkeys(sizes, 20) for task, sizes in mini.SIZES.items()})
        folders = prepared(recipe, benchmarks, benchmarks / "small")
    else:
        folders = prepared(recipe, benchmarks, cache)
    tasks = {name: read_task(folder) for name, folder in folders.items()}
    rewards = Rewards(tasks, {"accuracy": 1.0}, set())
    for folder in folders.values():
        for sample in read_samples(folder, "train"):
            gold, best = rewards.attain(sample)
            assert gold == best > 0, sample
            [score] = rewards.scores([sample], [stated(sample, final_answer(sample["completion"]))], [[]])
            assert not score["format_ok"]  # without an end token it is cut off, and has no form
            assert sample["prompt"][-1]["role"] == "user"  # the answer is in no turn before
            assert sample["completion"][0] not in sample["prompt"]


# --- Recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", PACKAGED)
def test_every_recipe_of_a_benchmark_validates_and_prepares(recipe, benchmarks, cache):
    loaded = load_recipe(recipe)  # without data: it can be looked at before anything is downloaded
    for stage in loaded.stages:
        check_stage(stage)
        try_config(stage)
    folders = prepared(recipe, benchmarks, cache)
    assert list(folders) == [task.name for task in loaded.tasks]
    for folder in folders.values():
        task = read_task(folder)
        assert task["counts"]["train"] and task["counts"]["test"]
        assert check_gold(folder) == [], "a published gold answer is right for the task's scorer"
        assert not any("dropped" in note for note in task["notes"])


@pytest.mark.parametrize("name", ["pope", "mmmu", "mmlu_pro"])
def test_every_probe_prepares_without_training_data(name, benchmarks, cache):
    assert load_probe(name).data.startswith("hub:")
    probe = load_probe(name, str(benchmarks / "probes" / name))
    folder = prepare_task(probe, PrepareConfig(), seed=0, asd=None, base_dir=benchmarks, cache=cache)
    counts = read_task(folder)["counts"]
    assert counts["train"] == 0 and counts["test"] > 0 and check_gold(folder) == []


def test_the_published_orders():
    orders = {name: [task.name for task in load_recipe(name).tasks] for name in PACKAGED}
    coin = ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA"]
    assert orders["coin/stream"] == orders["coin/asd_x20"] == orders["coin/lora"] == coin
    assert orders["ucit/stream"] == ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"]
    assert orders["dcl/stream"] == ["RS", "Med", "AD", "Sci", "Fin"]
    assert orders["ctbench/stream"] == ["numglue", "art", "math", "fomc", "medical", "OCR", "science"]
    assert orders["ctbench/order_b"] == orders["ctbench/stream"][::-1]
    assert orders["ctbench/order3"] == ["art", "OCR", "fomc", "science", "numglue", "math", "medical"]
    rft7 = ["ScienceQA", "TextVQA", "VizWiz", "GQA", "Geometry3K", "PathVQA", "Super-CLEVR"]
    assert orders["rft7/stream"] == orders["rft7/sft"] == rft7


# --- Layouts, field by field ------------------------------------------------------------------------------------------


def test_coin(benchmarks, cache):
    tasks = prepared("coin/stream", benchmarks, cache)
    sqa = first(tasks["ScienceQA"], "test")
    letters = "Answer with the option's letter from the given choices directly."
    question = "Which thing in the picture is soft?\nA. a magnet\nB. a spoon\nC. a sponge"
    assert said(sqa) == (f"{question}\n{letters}", "C")  # asked for in evaluation; the answer is in problems.json
    assert sqa["id"] == "11" and sqa["images"] == ["ScienceQA/test/11/image.jpg"] and sqa["references"] == ["C"]
    assert sqa["meta"]["options"] == ["a magnet", "a spoon", "a sponge"]
    assert first(tasks["ScienceQA"], "test", 1)["images"] == []
    assert said(first(tasks["ScienceQA"], "train"))[0].count(letters) == 1
    vqa = first(tasks["TextVQA"], "test")
    assert vqa["references"] == ["open"] * 7 + ["open daily"] * 3 and "Reference OCR token" in said(vqa)[0]
    assert len(first(tasks["GQA"], "train")["completion"]) == 3  # a dialogue stays one
    assert first(tasks["GQA"], "test", 1)["references"] == ["bone"]
    box = first(tasks["Grounding"], "test")
    assert said(box)[1] == "[0.12, 0.33, 0.55, 0.78]" and box["meta"]["size"] == [640, 480] and box["style"] == "bbox"
    assert first(tasks["VizWiz"], "test")["references"] == ["tea"]


def test_coin_asd_tells_the_style_of_each_row(benchmarks, cache):
    folder = prepared("coin/asd_x80", benchmarks, cache, "ScienceQA")["ScienceQA"]
    styles = [sample["style"] for sample in read_samples(folder, "train")]
    assert styles == ["mcq", "yes_no", "short", "brief", "detailed"]
    asked = [said(sample)[0] for sample in read_samples(folder, "train")]
    assert [question.count("from the given choices directly") for question in asked] == [1, 0, 0, 0, 0]
    assert read_task(folder)["style"] == "mcq" and {s["style"] for s in read_samples(folder, "test")} == {"mcq"}
    assert not any("form of their style" in note for note in read_task(folder)["notes"])


def test_ucit_captions_are_found_by_place(benchmarks, cache):
    folder = prepared("ucit/stream", benchmarks, cache, "Flickr30k")["Flickr30k"]
    samples = read_samples(folder, "test")
    assert samples[0]["references"] == ["A dog sleeps on a red mat.", "A brown dog lies on a mat."]
    assert samples[1]["references"] == ["A man repairs a bicycle."] and samples[1]["images"] == ["Flickr30k/val/4.jpg"]


def test_dcl_asks_as_the_published_evaluation_does(benchmarks, cache):
    tasks = prepared("dcl/stream", benchmarks, cache)
    assert said(first(tasks["RS"], "test"))[1] == "2"
    assert said(first(tasks["Med"], "test")) == (
        "Is the tissue stained? Answer the question with a single word (or phrase).",
        "yes",
    )
    no, letter = read_samples(tasks["Fin"], "test")
    assert said(no) == ("Does the volume double? Only answer with yes or no directly.", "No")
    assert said(letter)[0].endswith("Answer with the given letter directly, e.g., A, B, C, D.")
    assert (no["style"], letter["style"]) == ("yes_no", "mcq")
    assert [sample["style"] for sample in read_samples(tasks["Fin"], "train")] == ["yes_no", "mcq"]


def test_ctbench(benchmarks, cache):
    tasks = prepared("ctbench/stream", benchmarks, cache)
    tagged, untagged = read_samples(tasks["numglue"], "train")
    think = "Think first, then answer, in the form <think>...</think><answer>...</answer>."
    assert said(tagged) == (
        f"A crate holds 4 rows of 6 jars. How many jars are in 2 crates?\nAnswer with a number.\n{think}",
        "<think>One crate holds 24 jars. Two hold 48.</think><answer>48</answer>",
    )
    assert said(untagged)[1] == "<think>9 divided by 3 is 3.</think><answer>3</answer>"
    assert tagged["id"] == "n1" and tagged["reasoning"] == "think" and tagged["references"] == ["48"]
    assert said(first(tasks["numglue"], "test"))[1] == "12"
    assert [sample["style"] for sample in read_samples(tasks["math"], "train")] == ["mcq", "yes_no", "number"]
    art = first(tasks["art"], "train")
    assert art["images"] == ["art_vqa_datasets/AQUA/train/p1.jpg"]  # out of img.zip
    assert (Path(read_task(tasks["art"])["image_root"]) / art["images"][0]).is_file()


def test_ctbench_broken_json_is_passed_over_and_counted(benchmarks, cache):
    folder = prepared("ctbench/stream", benchmarks, cache, "science")["science"]
    assert [sample["id"] for sample in read_samples(folder, "train")] == ["s1", "s3"]
    (note,) = [note for note in read_task(folder)["notes"] if "not JSON" in note]
    assert note.startswith("1 stretches that are not JSON passed over; the first: ") and "science.json:8" in note


@pytest.mark.parametrize(
    ("file", "question", "solution"),
    [
        (
            "art_reasoning_samples",
            "Who is shown? Answer the question briefly.",
            "<think>She holds a wheel, and a wheel is the sign of one saint alone.</think>"
            "<answer>Saint Catherine</answer>",
        ),
        ("fomc_reasoning_samples", None, "<think>Rising rates are tight policy</think><answer>B</answer>"),
        ("llava_train", None, "<think>An open book lies in the lap.</think><answer>Reading</answer>"),
    ],
)
def test_ctbench_llava_rows_and_reasoning_left_in_the_question(file, question, solution):
    raw = json.loads((FIXTURES / "ctbench" / "raw" / f"{file}.json").read_text())[0]
    row = load_layout("ctbench", FIXTURES).read(raw, "train", "here")
    asked = raw["conversations"][0]["value"].removeprefix("<image>\n")
    assert row["prompt"] == (question or asked) and row["completion"] == solution
    assert row["id"] == raw["id"] and row["image"] == raw.get("image")


def test_ctbench_questions_of_the_llava_variant_take_their_answers_from_the_test_file(benchmarks, cache):
    own = ["stream.art.test=llava_eval/art.jsonl", "stream.art.answers=reasoning_test/art.json"]
    root = benchmarks / "ctbench"
    loaded = load_recipe("ctbench/stream", [f"data={root}", *(line.replace("=", f"={root}/") for line in own)])
    folder = prepare_task(loaded.task("art"), loaded.prepare, seed=0, asd=None, base_dir=root, cache=cache)
    sample = first(folder, "test")
    assert sample["references"] == ["A jug of wine"] and sample["id"] == "a3" and said(sample)[1] == "A jug of wine"


def test_a_prepared_task_is_trl_jsonl_that_reads_back_the_same(benchmarks, cache):
    folder = prepared("coin/stream", benchmarks, cache, "Grounding")["Grounding"]
    task = TaskConfig(
        name="Grounding",
        train=str(folder / "train.jsonl"),
        test=str(folder / "test.jsonl"),
        images=str(benchmarks / "coin"),
    )
    again = prepare_task(task, PrepareConfig(), seed=0, asd=None, base_dir=folder, cache=cache)
    for part in ("train", "test"):
        assert read_samples(again, part) == read_samples(folder, part)


def test_rft7(benchmarks, cache):
    tasks = prepared("rft7/sft", benchmarks, cache)
    short = "Answer the question using a single word or phrase."
    sqa, alone = read_samples(tasks["ScienceQA"], "train")
    assert said(sqa)[0].startswith("Context: Look at the picture.\nWhich of these sticks to iron?\nA. a magnet\n")
    assert said(sqa)[1] == "A" and len(sqa["images"]) == 1 and alone["images"] == [] and said(alone)[1] == "B"
    assert read_task(tasks["TextVQA"])["counts"]["train"] == 2  # of two files
    text = first(tasks["TextVQA"], "test")
    assert said(text) == (f"what is on the door?\n{short}", "exit") and len(text["references"]) == 10
    vizwiz = first(tasks["VizWiz"], "test")
    assert vizwiz["images"] == ["val/VizWiz_val_00000000.jpg"] and said(vizwiz)[1] == "tea"
    gqa = first(tasks["GQA"], "test")
    assert (gqa["id"], gqa["images"], said(gqa)[1]) == ("201", ["n3.jpg"], "yes")
    assert said(first(tasks["Geometry3K"], "train", 1)) == (
        "Find the length of AB.\nAnswer in LaTeX.",
        "2 \\sqrt { 13 }",
    )
    assert said(first(tasks["PathVQA"], "test"))[1] == "yes"
    clevr = [said(sample)[1] for sample in read_samples(tasks["Super-CLEVR"], "train")]
    assert clevr == ["3", "no"] and said(first(tasks["Super-CLEVR"], "test"))[1] == "small"
    notes = read_task(tasks["Super-CLEVR"])["notes"]
    assert "train: 2 rows belong to another part of the data (layout superclevr)" in notes


def test_the_same_stream_with_and_without_reasoning(benchmarks, cache):
    think = first(prepared("rft7/stream", benchmarks, cache, "PathVQA")["PathVQA"], "test")
    bare = first(prepared("rft7/sft", benchmarks, cache, "PathVQA")["PathVQA"], "test")
    assert think["reasoning"] == "think" and said(think)[0].startswith(said(bare)[0]) and said(think) != said(bare)


def test_probes(benchmarks, cache):
    def samples(name):
        probe = load_probe(name, str(benchmarks / "probes" / name))
        folder = prepare_task(probe, PrepareConfig(), seed=0, asd=None, base_dir=benchmarks, cache=cache)
        return read_samples(folder, "test")

    dog, boat = samples("pope")
    assert (dog["id"], boat["id"]) == ("random-1", "popular-1")
    assert said(dog) == ("Is there a dog in the image?\nAnswer with yes or no.", "yes")
    older, length = samples("mmmu")
    assert said(older)[0].startswith("Which of these is older, image 1 or image 2?\nA. image 1\nB. image 2\n")
    assert len(older["images"]) == 2 and said(older)[1] == "B"
    assert length["style"] == "short" and length["references"] == ["4", "4 cm"]
    (product,) = samples("mmlu_pro")
    assert "\nJ. 72\n" in said(product)[0] and said(product)[1] == "B" and product["id"] == "70"
    ((where, raw),) = read_rows("pope_official.json", "test", FIXTURES / "probes")
    official = load_layout("pope", FIXTURES).read(raw, "test", where)
    assert official["image"] == "COCO_val2014_000000000001.jpg" and official["completion"] == "yes"


# --- What comes after -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
def test_asd_of_every_task_reaches_its_share_or_says_why(stream, benchmarks, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MCIT_CACHE", str(cache))
    unreachable = set()
    for name, folder in prepared(f"{stream}/stream", benchmarks, cache).items():
        few, images = read_samples(folder, "train"), (folder / read_task(folder)["image_root"]).resolve()
        many = [{**sample, "id": f"{sample['id']}-{copy}"} for copy in range(50) for sample in few]
        write_jsonl(tmp_path / f"{name}.jsonl", many)
        asd, target = AsdConfig(fraction=0.2), tmp_path / f"{name}-asd.jsonl"
        report = convert_file(tmp_path / f"{name}.jsonl", target, asd, 0, images, print)
        assert report["validation"] == {"checked": report["converted"], "failed": {}}
        assert [row["id"] for row in read_jsonl(target)] == [sample["id"] for sample in many]
        if not report["within_half_a_point"]:
            assert report["why_not"]
            unreachable.add(name)
    free_text = {"ucit": {"VizWiz", "Flickr30k"}, "dcl": {"AD"}, "ctbench": {"art", "medical", "OCR"}}
    assert unreachable == free_text.get(stream, set())


@pytest.mark.parametrize("stream", STREAMS)
def test_the_command_converts_a_published_file_of_every_task_and_reads_it_as_the_recipe_does(
    stream, benchmarks, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("MCIT_CACHE", str(cache))
    recipe = load_recipe(f"{stream}/stream", [f"data={benchmarks / stream}"])
    for task in recipe.tasks:
        source, target = Path(task.train), tmp_path / f"{task.name}.jsonl"
        images = Path(task.images) if task.images else None
        more = {"layout": task.layout, "on_bad": recipe.prepare.on_bad}
        convert_file(source, target, AsdConfig(fraction=0), 0, images, print, **more)
        native = [sample["completion"] for sample in read_jsonl(target)]
        folder = prepare_task(task, recipe.prepare, seed=0, asd=None, base_dir=Path(recipe.folder), cache=cache)
        assert native == [sample["completion"] for sample in read_samples(folder, "train")]
        report = convert_file(source, target, AsdConfig(fraction=0.5), 0, images, print, **more)
        assert report["validation"]["failed"] == {} and len(read_jsonl(target)) == len(native)


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stage_of_every_stream_can_be_shown(stream, benchmarks, cache, monkeypatch):
    monkeypatch.setenv("MCIT_CACHE", str(cache))
    tiny = f"base_model.path={RECIPES / 'mini' / 'tiny_vlm'}"
    recipe = load_recipe(f"{stream}/stream", [f"data={benchmarks / stream}", tiny, "base_model.processor={}"])
    for stage in recipe.stages:
        for shown in read_stage(recipe, stage.k, 1):
            taught = "".join(span.text for span in shown.spans if span.loss)
            assert all(turn["content"] in taught for turn in shown.sample["completion"] if turn["role"] == "assistant")
            assert shown.gold["verdict"] == "correct" and len(shown.images) == len(shown.sample["images"])


# --- The mechanism ----------------------------------------------------------------------------------------------------


def test_every_layout_says_what_it_is_and_is_used():
    used = {str(task.layout) for name in PACKAGED for task in load_recipe(name).tasks}
    used |= {str(load_probe(name).layout) for name in ("pope", "mmmu", "mmlu_pro")}
    for name in layout_names():
        assert any(name in layout for layout in used)
        assert load_layout(name, FIXTURES).row.__module__ == f"mcit.data_prep.layouts.{name}"


def test_the_layout_of_the_documentation_works(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    code, stream = re.findall(r"## A layout of your own.*?```python\n(.*?)```.*?```yaml\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "my_layout.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(f"name: mine\nbase_model: {{path: acme/tiny}}\n{stream}")
    shutil.copytree(FIXTURES / "ucit" / "datasets" / "Flickr30k" / "val", tmp_path / "scans")
    raw = [
        {"uid": "7", "question": "Total?", "total": "$12", "total_without_currency": "12", "scan": f"{n}.jpg"}
        for n in (3, 4)
    ]
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, raw)))
    recipe = load_recipe(tmp_path / "mine.yaml")
    folder = prepare_task(recipe.tasks[0], recipe.prepare, seed=0, asd=None, base_dir=tmp_path, cache=tmp_path)
    sample = first(folder, "test", 1)
    assert sample["references"] == ["$12", "12"] and sample["images"] == ["4.jpg"]


@pytest.mark.slow
def test_a_packaged_benchmark_runs_to_its_report(benchmarks, tmp_path):
    overrides = f"""
        data={benchmarks / "coin"} stream=[Grounding] base_model.path={RECIPES / "mini" / "tiny_vlm"} train.lora.r=4
        base_model.dtype=float32 train.max_length=null train.global_batch_size=2 eval.engine=transformers
        train.sft.args.per_device_train_batch_size=1 train.sft.args.warmup_steps=0 eval.max_new_tokens=8
    """.split()
    command = [sys.executable, "-c", "from mcit.pipeline.cli import main; main()", "run", "coin/stream", *overrides]
    env = os.environ | {"MCIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert [task["name"] for task in read_results(tmp_path / "run")["tasks"]] == ["Grounding"]
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def test_settling_unpacks_an_archive_once(benchmarks, tmp_path):
    (task,) = [
        task for task in load_recipe("ctbench/stream", [f"data={benchmarks / 'ctbench'}"]).tasks if task.name == "art"
    ]
    images = settle(task, tmp_path, tmp_path).images
    assert images == settle(task, tmp_path, tmp_path).images and Path(images).is_relative_to(tmp_path)
