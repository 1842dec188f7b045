"""What an answer earns: the evaluation's own score of it, its form, and functions of the user's own."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from mcit.data_prep.errors import InputError
from mcit.data_prep.forms import final_answer
from mcit.data_prep.readers import is_function, load_function
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.data_prep.styles import split_reasoning
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import Score, score_response

HOPELESS = 256  # answers of a task without any reward, after which nothing is expected of it: ours


class Rewards:
    """The rewards `weights` names, as functions that TRL calls, and what each task has earned by them so far.

    `accuracy` in [0, 1] is the score that evaluation gives the answer, by the scorer of the sample's own task, so an
    answer in the wrong form earns none; `format` is 1 for the right form. `module:function` is called with (response,
    references, sample) and returns any finite number, or None where it says nothing.
    """

    def __init__(self, tasks: Mapping[str, PreparedTask], weights: Mapping[str, float], end_tokens: set[int]):
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.scorers = {
            name: get_scorer(task["scorer"] if task["reward"] == "same" else task["reward"])
            for name, task in tasks.items()
        }
        self.end_tokens = end_tokens
        # Answers by task: all, those with some reward, and those that were cut off.
        self.asked, self.earned, self.cut = Counter[str](), Counter[str](), Counter[str]()
        self.functions = [self._function(name) for name in self.weights]

    def scores(self, samples: Sequence[Sample], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[Score]:
        """How evaluation would score the answers `texts`, whose tokens are `ids`: without an end token, as cut off."""
        return [
            score_response(sample, text, self._scorer(sample), bool(tokens) and tokens[-1] in self.end_tokens)
            for sample, text, tokens in zip(samples, texts, ids, strict=True)
        ]

    def totals(self, samples: Sequence[Sample], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[float]:
        """The weighted sum of all rewards of each answer."""
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = [function(completions=completions, completion_ids=ids, sample=samples) for function in self.functions]
        rows = zip(*columns, strict=True)
        return [sum(w * (r or 0.0) for w, r in zip(self.weights.values(), row, strict=True)) for row in rows]

    def attain(self, sample: Sample) -> tuple[float, float]:
        """(what the gold answer's accuracy earns, what the best of the references does), both in [0, 1]."""
        scorer, answers = self._scorer(sample), [final_answer(sample["completion"]), *sample["references"]]
        earned = [score_response(sample, stated(sample, answer), scorer)["score"] / 100 for answer in answers]
        return earned[0], max(earned[1:])

    def check(self, least: int = 0) -> None:
        """Refuse a task of whose answers, `least` or more, none has earned anything. All processes call it together.

        Raises `InputError`.
        """
        asked, earned, cut = (sum(gather_object([one]), Counter[str]()) for one in self._counts())
        for task, count in asked.items():
            if count >= least and not earned[task]:
                problem = f"none of {count} answers earned any reward, and {cut[task]} were cut off"
                raise InputError(
                    f"{problem}: that teaches nothing",
                    where=f"task {task}",
                    field="train.rft.rewards",
                    remedy="Raise max_completion_length if they were cut off, check scorer and style (`mcit show` "
                    "scores the gold answers), or teach the form first by train.paradigm: sft+rft",
                )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"counts": [dict(one) for one in self._counts()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.asked, self.earned, self.cut = (Counter(one) for one in state["counts"])

    def _counts(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        return self.asked, self.earned, self.cut

    def _scorer(self, sample: Sample) -> Any:
        if sample["task"] not in self.scorers:
            raise InputError("is of no task with a reward", where=f"sample {sample['id']} of {sample['task']}")
        return self.scorers[sample["task"]]

    def _function(self, name: str) -> Callable[..., list[float | None]]:
        own = load_function(name, Path.cwd()) if is_function(name) else None

        def reward(completions: Any, completion_ids: Any, sample: Sequence[Sample], **more: Any) -> list[float | None]:
            texts = [completion[0]["content"] for completion in completions]
            if own is not None:
                values = [_called(name, own, text, row) for text, row in zip(texts, sample, strict=True)]
            else:
                scores = self.scores(sample, texts, completion_ids)
                values = [s["score"] / 100 if name == "accuracy" else float(s["format_ok"]) for s in scores]
                if "log_metric" in more:
                    more["log_metric"]("format_rate", sum(s["format_ok"] for s in scores) / len(scores))
            self._count(name, values, sample, completion_ids, more)
            return values

        reward.__name__ = name
        return reward

    def _count(
        self, name: str, values: Sequence[float | None], samples: Sequence[Sample], ids: Sequence[Any], more: Any
    ) -> None:
        """Keep account by task of what TRL is given, and have it log a mean for each task of several."""
        if "log_metric" not in more:
            return
        if name == next(iter(self.weights)):
            for sample, tokens in zip(samples, ids, strict=True):
                self.asked[sample["task"]] += 1
                self.cut[sample["task"]] += not (tokens and tokens[-1] in self.end_tokens)
        by_task: dict[str, list[float]] = {}
        for value, sample in zip(values, samples, strict=True):
            by_task.setdefault(sample["task"], []).append(value or 0.0)
        for task, earned in by_task.items():
            self.earned[task] += sum(value != 0 for value in earned)
            if len(self.scorers) > 1:
                more["log_metric"](f"rewards/{name}/{task}", sum(earned) / len(earned))


def _called(name: str, function: Callable[..., Any], text: str, sample: Sample) -> float | None:
    """What a reward of the user's own gives for one answer. Raises `InputError` where it fails or is no number."""
    where = f"reward {name}: sample {sample['id']} of {sample['task']}"
    try:
        value = function(text, sample["references"], sample)
        value = None if value is None else float(value)
    except Exception as error:
        raise InputError(f"{type(error).__name__}: {error}", where=where) from error
    if value is not None and not math.isfinite(value):
        raise InputError(f"returned {value}", where=where, remedy="Return a finite number, or None")
    return value


def stated(sample: Sample, answer: str) -> str:
    """`answer` in the form that `sample` asks for, with the sample's own thinking or, if it has none, a stand-in."""
    if sample["reasoning"] == "none":
        return answer
    think = split_reasoning(sample["completion"][-1]["content"], "think")[0]
    return f"<think>{think or 'It follows.'}</think><answer>{answer}</answer>"


class RewardsDiffer(TrainerCallback):
    """Refuses a training in which no reward ever differed within a group, and one of whose tasks earns nothing."""

    def __init__(self, stage: str, rewards: Rewards):
        self.stage, self.rewards = stage, rewards

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rewards.check(HOPELESS)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alike = [row["frac_reward_zero_std"] for row in state.log_history if "frac_reward_zero_std" in row]
        if alike and min(alike) == 1:
            rewards = [row["reward"] for row in state.log_history if "reward" in row]
            raise InputError(
                f"all answers to a prompt always earned the same reward ({min(rewards):g} to {max(rewards):g}), so "
                "nothing was learned",
                where=f"stage {self.stage}",
                field="train.rft",
                remedy="Check the reward, or raise args.temperature or args.num_generations",
            )
        self.rewards.check()
