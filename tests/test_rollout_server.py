"""Rollouts by a real vLLM server, which is sent the adapter of each step through a shared folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rollouts import copy_run, reinforce, trained  # noqa: F401
from vllm_server import any_server

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.vllm_server import server_command

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    """The server that `mcit rollouts` starts for the last stage, whose policy has rank 12."""
    run = Run(load_recipe(trained[1]), trained[0], Launch.named("single"))
    _, _, _, *options = server_command(run, 3)
    assert "--max-lora-rank=16" in options and '--limit-mm-per-prompt={"image": 1, "video": 0}' in options
    with any_server(tmp_path_factory.mktemp("vllm") / "log", options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as url:
        yield url


def test_a_server_answers_by_the_adapter_of_each_step(
    trained: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images as they are trained on, log-probabilities as the trainer's; nothing is left behind.

    The recipe names server and folder, or a job does, and the folder is the run's.
    """
    adapters = tmp_path / "adapters"
    named = f"train.rft.rollout={{engine: server, url: '{url}', adapters: '{adapters}'}}"
    for name, k, rollout in (("02-again", 2, named), ("03-words", 3, "train.rft.rollout.engine=server")):
        monkeypatch.setenv("MCIT_ROLLOUT_URL", url if k == 3 else "http://127.0.0.1:1/v1")
        run = copy_run(trained, tmp_path / name)
        if k == 3:
            (run / "stages" / "02-again").symlink_to(trained[0] / "stages" / "01-colour")
        folder, _ = reinforce(run, trained[1], rollout, "train.rft.args.temperature=0.5", k=k)
        log = [row for row in read_jsonl(folder / "train_log.jsonl") if "reward" in row]
        assert len(log) == 3 and all(row["rollout_gap"] < 1e-3 for row in log)
        assert read_json(folder / "trained.json")["rollouts"]["sent"] == 3
        assert not list((run / "stages").glob(".*"))
    assert not list(adapters.iterdir())


def test_a_server_that_is_not_there_is_one_clear_line(
    trained: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    rollout = f"train.rft.rollout={{engine: server, url: 'http://127.0.0.1:1/v1', adapters: '{tmp_path}'}}"
    with pytest.raises(InputError, match=r"127.0.0.1:1/v1: train.rft.rollout.url: cannot be reached"):
        reinforce(copy_run(trained, tmp_path / "run"), trained[1], rollout)
    with pytest.raises(InputError, match=r"train.rft.rollout.url: is not set. Name a vLLM server here or in MCIT_"):
        reinforce(copy_run(trained, tmp_path / "none"), trained[1], "train.rft.rollout.engine=server")
