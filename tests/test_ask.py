"""`mcit ask`: one question to several policies."""

import json
import math
from pathlib import Path

import pytest
import yaml
from random_model import RANDOM
from serving import base_policy, lora_policy, make_images
from typer.testing import CliRunner

from mcit.data_prep.errors import InputError
from mcit.eval.ask import ask, read_policies
from mcit.eval.config import EvalConfig
from mcit.eval.engines.base import Request
from mcit.eval.engines.transformers import TransformersEngine
from mcit.pipeline.cli import app

QUESTION = "Is there a circle? Answer yes or no."
CONFIG = EvalConfig(engine="transformers", max_new_tokens=6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base_policy(tmp_path / "stages")
    lora_policy(tmp_path / "stages", 1, "one", 4)
    lora_policy(tmp_path / "stages", 2, "two", 4)
    return tmp_path


def test_every_policy_answers_for_itself(run: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 1)
    policies = read_policies(run, ())
    answers = ask(policies, QUESTION, images, CONFIG)
    assert [(a.stage, a.name) for a in answers] == [(0, "base"), (1, "one"), (2, "two")]
    engine = TransformersEngine(policies, CONFIG)
    for answer, policy in zip(answers, policies, strict=True):
        request = Request([{"role": "user", "content": QUESTION}], images, policy, answer.answer)
        [(_, alone)] = engine.stream([request], 6)
        assert (answer.answer, answer.finished) == (alone.text, alone.finished)
        if answer.finished:
            assert answer.probability == pytest.approx(math.exp(sum(engine.logprobs([request])[0].logprobs)), rel=1e-4)
        else:
            assert answer.probability is None


def test_only_the_stages_asked_for_in_order(run: Path) -> None:
    assert [policy.serving.stage for policy in read_policies(run, (2, 0, 2))] == [0, 2]


def test_a_stage_that_is_not_there(run: Path) -> None:
    with pytest.raises(InputError, match=r"there is no stage 7.*There are 0, 1, 2"):
        read_policies(run, (7,))
    with pytest.raises(InputError, match="holds no policy"):
        read_policies(run / "elsewhere", ())


def test_an_image_that_does_not_open(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but no more")
    with pytest.raises(InputError, match="cannot be decoded"):
        ask(read_policies(run, ()), QUESTION, [broken], CONFIG)


def test_the_command_prints_json(run: Path) -> None:
    recipe = {
        "name": "asked",
        "base_model": {"path": str(RANDOM), "dtype": "float32"},
        "stream": [{"name": "digits", "train": "mcit.data_prep.mini.tasks:digits"}],
        "eval": {"engine": "transformers", "max_new_tokens": 6},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["ask", str(run), QUESTION, "--stage", "1", "--stage", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert [answer["name"] for answer in json.loads(result.stdout)] == ["base", "one"]
