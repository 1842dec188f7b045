"""Checks against a real processor: exact tokens without pixels, placeholders, and what does not fit."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

import mcit.recipes
from mcit.data_prep.chat import render_chat, tokenizer_options
from mcit.data_prep.checks import check_samples, fit_task
from mcit.data_prep.errors import InputError
from mcit.data_prep.images import load_image
from mcit.data_prep.prepare import image_path, prepare_task, read_samples, read_task
from mcit.data_prep.schema import PrepareConfig, TaskConfig

TINY = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"
SIZES = [(40, 40), (100, 30), (31, 200), (300, 280)]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


def task_folder(root: Path, rows: list[dict]) -> Path:
    (root / "train.json").write_text(json.dumps(rows))
    config = TaskConfig(name="t", train="train.json", test="train.json", style="short")
    return prepare_task(config, PrepareConfig(), seed=0, asd=None, base_dir=root, cache=root / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text only, one image of each size, two images, and a dialogue."""
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, (number * 50, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"id": "text", "prompt": "What is 2 + 5?", "completion": "7"}]
    rows += [{"id": f"one{n}", "prompt": "Q?", "completion": "red", "images": [f"{n}.png"]} for n in range(len(SIZES))]
    rows.append({"id": "two", "prompt": "Which?", "completion": "red", "images": ["0.png", "3.png"]})
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("q", "a", "r", "b"))]
    rows.append({"id": "talk", "messages": turns, "images": ["1.png"]})
    return task_folder(tmp_path, rows)


def by_running(folder: Path, processor) -> dict[str, int]:
    """Tokens of each training sample as the whole processor makes them."""
    task, lengths = read_task(folder), {}
    for sample in read_samples(folder, "train"):
        messages = [*sample["prompt"], *sample["completion"]]
        text = render_chat(processor, messages, len(sample["images"]), add_generation_prompt=False)
        images = [load_image(image_path(folder, task, name)) for name in sample["images"]]
        inputs = processor(text=[text], images=images or None, **tokenizer_options(processor, text))
        lengths[sample["id"]] = len(inputs["input_ids"][0])
    return lengths


def test_tokens_are_exact(folder: Path, processor) -> None:
    truth = by_running(folder, processor)
    fit = check_samples(folder, processor, None)
    length = fit.lengths["train"]
    assert (length.samples, length.max, length.longest) == (7, max(truth.values()), max(truth, key=truth.__getitem__))
    assert length.mean == pytest.approx(sum(truth.values()) / 7)
    # The limit is sharp, so every single count is right.
    for limit in sorted(set(truth.values())):
        bad = check_samples(folder, processor, limit - 1, on_bad="drop").bad["train"]
        assert set(bad) == {identity for identity, tokens in truth.items() if tokens >= limit}


def test_images_are_not_decoded_once_the_rule_is_proved(folder: Path, processor, monkeypatch) -> None:
    runs = []
    original = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda self, **kw: runs.append(kw) or original(self, **kw))
    check_samples(folder, processor, None)
    assert len(runs) == 2  # one sample of one image, one of two


def test_a_rule_that_is_wrong_is_not_used(folder: Path, processor, monkeypatch) -> None:
    truth = check_samples(folder, processor, None)
    monkeypatch.setattr(
        type(processor), "_get_num_multimodal_tokens", lambda self, image_sizes: {"num_image_tokens": [1]}
    )
    assert check_samples(folder, processor, None) == truth


def test_too_long_names_sample_tokens_limit_and_remedy(folder: Path, processor) -> None:
    truth = by_running(folder, processor)
    first = next(identity for identity, tokens in truth.items() if tokens > 60)
    message = rf"^t: train sample {first}: has {truth[first]} tokens, images included, but only 60 fit\. Raise train\."
    with pytest.raises(InputError, match=message):
        check_samples(folder, processor, 60)


def test_what_does_not_fit_the_model_is_not_told_to_raise_a_limit(folder: Path, processor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only 60 fit into the base model's context\. Shorten it, lower base_model\."):
        check_samples(folder, processor, 4096, None, 60)
    with pytest.raises(InputError, match=r"only 50 fit\. Raise train\.max_length"):
        check_samples(folder, processor, 50, None, 60)
    text = task_folder(tmp_path, [{"id": "x", "prompt": "word " * 99, "completion": "a"}])
    with pytest.raises(InputError, match=r"into the base model's context\. Shorten it, or set prepare\.on_bad: drop"):
        check_samples(text, processor, None, None, 60)


def test_dropping_what_does_not_fit(folder: Path, processor, tmp_path: Path) -> None:
    smaller, fit = fit_task(folder, processor, 60, on_bad="drop", cache=tmp_path / "cache")
    kept = {sample["id"] for sample in read_samples(smaller, "train")}
    assert kept and kept == {s["id"] for s in read_samples(folder, "train")} - set(fit.bad["train"])
    assert check_samples(smaller, processor, 60).lengths["train"].max <= 60
    assert any("samples dropped, the model cannot take them" in note for note in read_task(smaller)["notes"])
    assert fit_task(folder, processor, None, on_bad="drop", cache=tmp_path / "cache")[0] == folder
    with pytest.raises(InputError, match="no sample of the train part is left"):
        fit_task(folder, processor, 3, on_bad="drop", cache=tmp_path / "cache")


def test_the_models_own_placeholder_in_a_text_is_refused(tmp_path: Path, processor) -> None:
    folder = task_folder(tmp_path, [{"id": "x", "prompt": f"What is {processor.image_token}?", "completion": "a"}])
    with pytest.raises(InputError, match=r"train sample x: the text of a user turn holds the model's placeholder"):
        check_samples(folder, processor, None)


def test_an_image_that_the_processor_refuses(tmp_path: Path, processor) -> None:
    Image.new("RGB", (3, 900)).save(tmp_path / "line.png")
    folder = task_folder(tmp_path, [{"id": "x", "prompt": "Q?", "completion": "a", "images": ["line.png"]}])
    with pytest.raises(InputError, match=r"train sample x: the processor refuses an image of \[\(900, 3\)\]"):
        check_samples(folder, processor, None)
