"""Rewards are the evaluation's own scores, by task; what a reward function of the user's own may do wrong."""

import math
from typing import Any

import pytest
from training import make_samples

from mcit.data_prep.errors import InputError
from mcit.pipeline.reinforcement.rewards import Rewards

HERE = "test_rewards"
TASK: Any = {"scorer": "short", "reward": "same"}
BOTH = {"accuracy": 0.9, "format": 0.1}


def brevity(response: str, references: list[str], sample: Any) -> float:
    return -float(len(response))


def silent(response: str, references: list[str], sample: Any) -> None:
    return None


def undefined(response: str, references: list[str], sample: Any) -> float:
    return math.nan


def broken(response: str, references: list[str], sample: Any) -> float:
    raise KeyError("box")


def ask(rewards: Rewards, *answers: tuple[str, list[int]], task: str = "colour") -> dict[str, Any]:
    """What TRL passes to a reward function."""
    [sample] = make_samples(task, 1)
    return {
        "prompts": None,
        "completions": [[{"role": "assistant", "content": text}] for text, _ in answers],
        "completion_ids": [ids for _, ids in answers],
        "sample": [sample] * len(answers),
        "log_metric": lambda name, value: rewards.__dict__.setdefault("logged", {}).update({name: value}),
    }


def test_rewards_are_the_evaluations_own() -> None:
    [sample] = make_samples("colour", 1)
    gold = sample["references"][0]
    rewards = Rewards({"colour": TASK}, BOTH, {7, 8})
    accuracy, form = rewards.functions
    long = "It might be one colour or the other, who knows, and then again it might not."
    answers = [(gold, [3, 7]), (gold, [3, 3]), ("nothing", [3, 8]), (long, [7]), ("", [])]
    call = ask(rewards, *answers)
    assert accuracy(**call) == [1, 0, 0, 0, 0]  # the second was cut off before its end
    assert form(**call) == [1, 0, 1, 0, 0]
    assert [function.__name__ for function in rewards.functions] == ["accuracy", "format"]
    texts, ids = zip(*answers, strict=True)
    assert rewards.totals([sample] * 5, texts, ids) == pytest.approx([1, 0, 0.1, 0, 0])


def test_a_reward_without_weight_is_not_asked() -> None:
    assert list(Rewards({"colour": TASK}, {"accuracy": 1, "format": 0}, {7}).weights) == ["accuracy"]


def test_each_task_is_rewarded_by_its_own_scorer() -> None:
    """And logged by its own name."""
    numbers: Any = {"scorer": "number", "reward": "same"}
    rewards = Rewards({"colour": TASK, "sum": numbers}, {"accuracy": 1.0}, {7})
    [colour], [total] = make_samples("colour", 1), make_samples("sum", 1)
    total = {**total, "references": ["12"], "style": "number"}
    call = ask(rewards, ("12.0", [7]), ("12.0", [7])) | {"sample": [colour, total]}
    assert rewards.functions[0](**call) == [0, 1]
    assert rewards.__dict__["logged"] == {
        "rewards/accuracy/colour": 0,
        "rewards/accuracy/sum": 1,
        "format_rate": 1,
    }


def test_own_rewards_count_beside_the_others() -> None:
    rewards = Rewards({"colour": TASK}, {"accuracy": 1.0, f"{HERE}:brevity": 0.5, f"{HERE}:silent": 1.0}, {7})
    call = ask(rewards, ("four", [7]))
    assert [function(**call) for function in rewards.functions] == [[0], [-4], [None]]
    assert rewards.totals(call["sample"], ["four"], [[7]]) == [-2]
    assert rewards.functions[1].__name__ == f"{HERE}:brevity"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("undefined", f"reward {HERE}:undefined: sample colour-0 of colour: returned nan. Return a finite number"),
        ("broken", f"reward {HERE}:broken: sample colour-0 of colour: KeyError: 'box'"),
    ],
)
def test_a_reward_that_fails_says_which_and_on_what(function: str, message: str) -> None:
    rewards = Rewards({"colour": TASK}, {f"{HERE}:{function}": 1.0}, {7})
    with pytest.raises(InputError, match=message):
        rewards.functions[0](**ask(rewards, ("red", [7])))


def test_a_task_that_earns_nothing_is_named() -> None:
    rewards = Rewards({"colour": TASK, "again": TASK}, BOTH, {7})
    gold = make_samples("colour", 1)[0]["references"][0]
    long = "It might be one colour or the other, who knows, and then again it might not."
    for function in rewards.functions:
        function(**ask(rewards, (gold, [7])))
    rewards.check()
    for function in rewards.functions:
        function(**ask(rewards, *[(long, [7])] * 2, (long, [3]), task="again"))
    with pytest.raises(
        InputError, match=r"task again: train.rft.rewards: none of 3 answers earned any reward, and 1 were"
    ):
        rewards.check()
    rewards.check(least=4)  # too few to tell
    later = Rewards({"colour": TASK, "again": TASK}, BOTH, {7})
    later.load_state_dict(rewards.state_dict())
    for function in later.functions:
        function(**ask(later, (long, [7]), task="again"))
    with pytest.raises(InputError, match="none of 4 answers earned any reward, and 1 were cut off"):
        later.check(least=4)


def test_a_sample_of_a_task_without_reward_is_refused() -> None:
    rewards = Rewards({"colour": TASK}, BOTH, {7})
    with pytest.raises(InputError, match="sample words-0 of words: is of no task with a reward"):
        rewards.functions[0](**ask(rewards, ("red", [7]), task="words"))
