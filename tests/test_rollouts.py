"""Who answers while GRPO trains, and what: vLLM with each step's adapter, samples worth it, groups that differ."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_rft import RECIPE, RFT, copy_run
from training import COLOURS, launch, make_run, make_samples

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.hashing import cache_dir
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.reinforcement.config import GuardConfig, RifConfig
from mcit.pipeline.reinforcement.guard import Collapsed, Guard
from mcit.pipeline.reinforcement.rif import keeps
from mcit.pipeline.reinforcement.rollouts import Drawn, Draws, Rollouts, check_groups
from mcit.pipeline.reinforcement.shipping import check_tokens, runs
from mcit.pipeline.stage.stage import run_stage


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As in test_rft.py: colours, half of them taught wrongly."""
    run = tmp_path_factory.mktemp("run")
    samples = {
        name: make_samples(name, n, images=j) for name, n, j in [("colour", 32, 1), ("again", 24, 1), ("words", 12, 0)]
    }
    for sample in samples["colour"][::2]:
        colour = COLOURS.index(sample["references"][0])
        sample["completion"] = [{"role": "assistant", "content": COLOURS[colour - 1]}]
    recipe = make_run(run, samples, RECIPE)
    run_stage(load_recipe(recipe, ["method={}"]), 1, run, "sft", sft.make_trainer)
    return run, recipe


def reinforce(run: Path, recipe: Path, *overrides: str, k: int = 2) -> tuple[Path, Any]:
    """Stage `k`: its folder, and the trainer that made it."""
    kept: dict[str, Any] = {}

    def make(entered: Any) -> Any:
        kept["trainer"] = rft.make_trainer(entered)
        return kept["trainer"]

    loaded = load_recipe(recipe, [*RFT, "method={}", *overrides])
    run_stage(loaded, k, run, "rft", make)
    return run / "stages" / loaded.stages[k - 1].folder, kept["trainer"]


def delta(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "delta" / "adapter_model.safetensors")


def test_vllm_answers_by_the_adapter_of_each_step(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities are the trainer's at every step; when the engine dies in the middle, another goes on."""
    vllm_engine = pytest.importorskip("mcit.pipeline.reinforcement.vllm_engine")
    sample, calls, tokens = vllm_engine.RolloutVllm.sample, [], []

    def fails_once(self: Any, policy: Any, *rest: Any) -> Any:
        calls.append(policy.serving.hash)
        if len(calls) == 2:
            raise RuntimeError("EngineCore died")
        outputs = sample(self, policy, *rest)
        tokens.extend(token for output in outputs for answer in output.outputs for token in answer.token_ids)
        return outputs

    monkeypatch.setattr(vllm_engine.RolloutVllm, "sample", fails_once)
    run = copy_run(trained, tmp_path)
    faster = ("train.rft.args.learning_rate=5e-3", "train.rft.args.temperature=0.8")
    faster += ("train.rft.rewards={'test_rewards:brevity': 1.0}",)  # which differs in every batch
    folder, trainer = reinforce(run, trained[1], "train.rft.rollout.engine=vllm", *faster)
    log = [row for row in read_jsonl(folder / "train_log.jsonl") if "reward" in row]
    assert len(log) == 3 and all(row["rollout_gap"] < 3e-3 for row in log)
    assert abs(log[0]["kl_previous"]) < 1e-6 < 1e-5 < log[-1]["kl_previous"]
    rollouts = read_json(folder / "trained.json")["rollouts"]
    assert (rollouts["engine"], rollouts["sent"], rollouts["restarts"]) == ("vllm", 4, 1)
    assert len(calls) == 4 and len(set(calls)) == 3 and calls[1] == calls[2]  # named by content, one a step
    assert trainer.model.config.image_token_id not in tokens
    factors = sum(tensor.numel() for tensor in load_file(folder / "adapter" / "adapter_model.safetensors").values())
    assert 4 * factors < rollouts["bytes"] < 4 * factors + 20_000  # float32 factors, and no model
    with pytest.raises(RuntimeError, match=r"log-probabilities differ by .* more than train.rft.rollout.tolerance"):
        monkeypatch.setattr(
            vllm_engine.VllmRollouts, "_current", lambda self, trainer: self.policy or _first(self, trainer)
        )
        reinforce(
            copy_run(trained, tmp_path / "stale"),
            trained[1],
            *(*faster, "train.rft.rollout.engine=vllm"),
            *("train.rft.rollout.tolerance=3e-3", "train.rft.args.learning_rate=1e-2"),
        )


def _first(engine: Any, trainer: Any) -> Any:
    """What a stale cache would do: the first adapter for ever."""
    engine.policy = engine.shipping.write(0)
    engine.vllm.add(engine.policy)
    return engine.policy


def test_an_engine_that_ships_a_lora_refuses_full_tuning(trained: tuple[Path, Path], tmp_path: Path) -> None:
    full = ("train.lineage=full", "train.modules.language=full", "train.rft.rollout.engine=vllm")
    pytest.importorskip("vllm")
    with pytest.raises(InputError, match=r"train.rft.rollout.engine: ships a LoRA, and lineage full trains none"):
        reinforce(copy_run(trained, tmp_path), trained[1], *full)


def test_prompts_are_compared_token_by_token() -> None:
    [sample] = make_samples("colour", 1)
    check_tokens([[1, 7, 7, 2]], [[1, 7, 7, 2]], [sample])
    with pytest.raises(RuntimeError, match="sample colour-0 of colour: 5 tokens and 4, which differ from place 3 on"):
        check_tokens([[1, 7, 7, 7, 2]], [[1, 7, 7, 2]], [sample])
    with pytest.raises(RuntimeError, match="3 tokens and 4, which differ from place 3 on"):
        check_tokens([[1, 7, 7]], [[1, 7, 7, 2]], [sample])


def test_equal_prompts_are_one_request() -> None:
    one, two = make_samples("colour", 2)
    assert runs([one, one, two, two, two, one]) == [range(0, 2), range(2, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("accuracy", "competent", "variance"),
    [([0, 0, 0], False, False), ([0, 1, 0], True, True), ([1, 1, 1], True, False), ([0.5, 0.4, 0], False, False)],
)
def test_which_samples_are_learnable(accuracy: list[float], competent: bool, variance: bool) -> None:
    kept = [keeps(accuracy, RifConfig(keep=keep)) for keep in ("competent", "variance")]
    assert kept == [competent, variance]


def test_a_stage_trains_on_what_its_policy_can_learn(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried once, by the entering policy: from the cache the same samples train to the same weights."""
    rif = ("train.rft.rif={rollouts: 4, keep: competent}", "train.rft.args.temperature=0.7")
    folder, trainer = reinforce(copy_run(trained, tmp_path / "once"), trained[1], *rif)
    report = read_json(folder / "trained.json")["rif"]
    assert 4 <= report["kept"] < report["samples"] == 24 and not report["cached"]
    assert report["share"] == {"again": round(report["kept"] / 24, 4)}
    assert len(trainer.train_dataset) == report["kept"]
    [file] = (cache_dir() / "rif").iterdir()
    tried = read_json(file)
    assert {len(values) for values in tried.values()} == {4}
    kept = {name for name, values in tried.items() if max(values) > 0.5}
    assert len(tried) == 24 and {f"again {row['sample']['id']}" for row in trainer.train_dataset} == kept

    monkeypatch.setattr(rft.TransformersEngine, "draw", None)  # nobody is asked
    again, _ = reinforce(copy_run(trained, tmp_path / "again"), trained[1], *rif)
    assert read_json(again / "trained.json")["rif"] == {**report, "cached": True}
    one, two = delta(folder), delta(again)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    with pytest.raises(InputError, match=r"train.rft.rif: the entering policy leaves nothing to learn: .* accuracy is"):
        monkeypatch.setattr("mcit.pipeline.reinforcement.rif.keeps", lambda *_: False)
        reinforce(copy_run(trained, tmp_path / "nothing"), trained[1], *rif)


class Scripted:
    """An engine whose answers are written down: one line of them each time it is asked."""

    name = "scripted"

    def __init__(self, *lines: str):
        self.lines, self.asked = iter(lines), list[int]()

    def draw(self, prompts: Any, samples: Sequence[Sample], trainer: Any) -> Drawn:
        self.asked.append(len(prompts))
        ids = [[int(answer)] for answer in next(self.lines)[: len(prompts)]]
        return Drawn([[0]] * len(prompts), ids, [[-1.0 * one] for [one] in ids])


def draw(tries: int, *lines: str) -> tuple[dict[str, Any], Scripted, Rollouts]:
    """Answers to two prompts, two each; an answer earns its token."""
    engine = Scripted(*lines)
    rewards: Any = SimpleNamespace(totals=lambda samples, texts, ids: [float(one) for [one] in ids])
    rollouts = Rollouts(engine, rewards, tries)  # type: ignore[arg-type]
    accelerator = SimpleNamespace(gather=lambda tensor: tensor, device="cpu")
    decode = SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids))
    one, two = make_samples("colour", 2)
    trainer = SimpleNamespace(
        asked=[one, one, two, two], num_generations=2, accelerator=accelerator, processing_class=decode
    )
    return rollouts(["a", "a", "b", "b"], trainer), engine, rollouts


def test_groups_that_earn_the_same_are_drawn_again_so_often_and_no_more() -> None:
    drawn, engine, rollouts = draw(2, "1233", "44", "45")
    assert drawn["completion_ids"] == [[1], [2], [4], [5]] and engine.asked == [4, 2, 2]
    assert drawn["logprobs"] == [[-1], [-2], [-4], [-5]] and rollouts.report() == {"drawn_again": 0.5}
    drawn, engine, _ = draw(1, "1133", "1244", "4567")
    assert drawn["completion_ids"] == [[1], [2], [4], [4]] and engine.asked == [4, 4]
    drawn, engine, rollouts = draw(0, "1133")
    assert engine.asked == [4] and rollouts.report() == {}


def test_groups_must_lie_on_one_process_to_be_drawn_again() -> None:
    check_groups(8, 4, 2)
    check_groups(6, 4, 0)
    with pytest.raises(InputError, match=r"train.rft.rollout.resample: 6 answers on each process are not whole groups"):
        check_groups(6, 4, 1)


def test_a_stage_with_groups_drawn_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """By transformers too; fewer groups are then without a difference."""
    alike = []
    for tries in (0, 3):
        settings = (f"train.rft.rollout.resample={tries}", "train.rft.args.temperature=1.0")
        folder, _ = reinforce(copy_run(trained, tmp_path / str(tries)), trained[1], *settings)
        rows = [row for row in read_jsonl(folder / "train_log.jsonl") if "reward" in row]
        alike.append(sum(row["frac_reward_zero_std"] for row in rows))
    assert alike[1] < alike[0]
    assert read_json(folder / "trained.json")["rollouts"]["drawn_again"] > 0


@pytest.mark.slow
def test_two_processes_share_what_is_tried_and_draw_their_groups_again(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tries its half of the samples, once; both then train on the same ones, and so would one process."""
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    rif = ("method={}", "train.rft.rif={rollouts: 4, keep: competent}", "train.rft.args.temperature=1.0")
    run = copy_run(trained, tmp_path / "two")
    launch(run, trained[1], "ddp", 2, *RFT, *rif, "train.rft.rollout.resample=2", stage=2, script="rft")
    told = read_json(run / "stages" / "02-again" / "trained.json")
    [file] = (cache_dir() / "rif").iterdir()
    tried = read_json(file)
    assert len(tried) == 24 and {len(values) for values in tried.values()} == {4}
    assert (told["mode"], told["processes"], told["rif"]["cached"]) == ("ddp", 2, False)
    assert told["rif"]["kept"] == sum(max(values) > 0.5 for values in tried.values()) >= 4
    assert told["rollouts"]["drawn_again"] > 0
    alone, trainer = reinforce(copy_run(trained, tmp_path / "one"), trained[1], *rif)
    assert read_json(alone / "trained.json")["rif"] == {**told["rif"], "cached": True}
    assert len(trainer.train_dataset) == told["rif"]["kept"]


def guarded(config: GuardConfig, *rows: dict[str, float]) -> tuple[Guard, torch.nn.Linear, Any]:
    """A guard that has seen `rows`; the weight at row n is n."""
    model = torch.nn.Linear(1, 1, bias=False)
    guard, control = Guard(config, model), SimpleNamespace(should_training_stop=False)
    for step, row in enumerate(rows, 1):
        with torch.no_grad():
            if not control.should_training_stop:
                model.weight.fill_(step)
        logs = {"kl_previous": 0.1, "entropy": 1.0, "format_rate": 0.9, **row}
        guard.on_log(None, SimpleNamespace(global_step=step), control, logs)
    return guard, model, control


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"kl_previous": 9.0}, "KL to the previous policy is 9 nats a token"),
        ({"entropy": 6.0}, "entropy is 6 nats a token"),
        ({"format_rate": 0.4}, "40% of the answers have the right form, after 90%"),
    ],
)
def test_a_collapse_ends_the_stage_with_the_last_good_weights(bad: dict[str, float], reason: str) -> None:
    guard, model, control = guarded(GuardConfig(window=1), {}, {}, {}, bad, {})
    assert control.should_training_stop and guard.collapse == {"step": 4, "reason": reason, "kept_step": 2}
    assert model.weight.item() == 2  # row 3 was well, so the weights after row 2's step were


def test_a_guard_goes_on_from_a_checkpoint_as_if_it_had_not_stopped() -> None:
    bad = {"kl_previous": 9.0}
    before, model, _ = guarded(GuardConfig(window=1), {}, {}, {})
    after = Guard(GuardConfig(window=1), model)
    after.load_state_dict(before.state_dict())
    control = SimpleNamespace(should_training_stop=False)
    after.on_log(None, SimpleNamespace(global_step=4), control, logs={"format_rate": 1.0, "entropy": 0.5, **bad})
    assert control.should_training_stop and after.collapse is not None and after.collapse["kept_step"] == 2
    assert model.weight.item() == 2


def test_a_stage_that_goes_on_draws_what_it_would_have_drawn() -> None:
    trainer: Any = SimpleNamespace(args=SimpleNamespace(seed=3), state=SimpleNamespace(global_step=0), _step=0)
    whole, later, seeds = Draws(), Draws(), []
    for trainer.state.global_step, trainer._step in ((0, 0), (0, 0), (0, 1), (1, 2)):
        whole.next(trainer)
        seeds.append([whole.seed(trainer, place) for place in (0, 8)])
    later.next(trainer)  # of the process that takes the stage up
    assert [later.seed(trainer, place) for place in (0, 8)] == seeds[-1]
    assert len({seed for draw in seeds for seed in draw}) == 8, "drawn again, or in another step, they are others"


def test_no_collapse_is_seen_where_there_is_none() -> None:
    never = {"format_rate": 0.1}  # a form that was never learned has not been lost
    _, model, control = guarded(GuardConfig(window=2), never, never, {"kl_previous": 9.0, **never}, never)
    assert not control.should_training_stop and model.weight.item() == 4
    with pytest.raises(Collapsed, match="collapsed by step 2: KL to the previous policy is 9"):
        guarded(GuardConfig(window=1), {}, {"kl_previous": 9.0})


def test_a_stage_that_collapses_is_left_with_what_it_had(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """As if it had ended there."""
    steady = ("train.rft.args.lr_scheduler_type=constant", "train.rft.args.learning_rate=5e-3")
    steady += ("train.rft.args.temperature=1.0",)
    whole, _ = reinforce(copy_run(trained, tmp_path / "whole"), trained[1], *steady)
    kls = [row["kl_previous"] for row in read_jsonl(whole / "train_log.jsonl") if "reward" in row]
    limit = (kls[1] + kls[2]) / 2
    assert kls[1] < limit < kls[2]
    guard = f"train.rft.guard={{window: 1, kl: {limit}}}"
    stopped, _ = reinforce(copy_run(trained, tmp_path / "stopped"), trained[1], *steady, guard)
    short, _ = reinforce(copy_run(trained, tmp_path / "short"), trained[1], *steady, "train.rft.args.max_steps=1")
    assert read_json(stopped / "trained.json")["collapse"]["kept_step"] == 1
    one, two = delta(stopped), delta(short)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
