"""What happened in a run, in words: what its figures mean, and the sentences that a page or a card begins with."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..stats import Interval

METRICS = {  # the order of the table, and what each says
    "MFT": "mean score right after a task was learned",
    "MFN": "mean score after the last stage",
    "MAA": "mean over stages of the mean score on what was learned so far",
    "BWT": "mean change since learned (below 0: forgotten)",
    "forgetting": "mean drop from a task's best score",
    "FWT": "mean gain on a task before it is trained, over the base",
    "superficial": "mean loss of earlier tasks that answers held to the form do not show: form, not knowledge",
    "essential": "mean loss of earlier tasks that they do show: knowledge",
    "recoverable": "final answers on earlier tasks that are right but for their form, %",
    "TA": "CoIN's Truth Alignment: mean score after the last stage, in the form asked for",
    "KC": "its Knowledge Capability, by rules: the same of what the answers say, whatever their form",
    "reasoning_MFT": "mean score of the reasoning right after a task was learned (tasks with chains of thought)",
    "reasoning_MFN": "the same after the last stage",
    "reasoning_MAA": "mean over stages of the mean reasoning score on what was learned so far",
    "reasoning_BWT": "mean change of the reasoning score since learned (below 0: forgotten)",
    "reasoning_forgetting": "mean drop from a task's best reasoning score",
    "general": "mean score on the general tasks after the last stage",
    "general_base": "the same of the untouched base",
    "general_nll": "nats a token of the general tasks' own answers, after the last stage (less is better)",
    "general_F1": "harmonic mean of general and MFN",
    "min_ACC": "mean over earlier tasks of the worst score since learned, inside stages too (teacher-forced probes)",
    "WC_ACC": "the same with the tasks of the last stage at its end: the worst case a user met",
    "WF": "mean over tasks of the largest fall within 10 optimizer steps",
    "WP": "mean over tasks of the largest rise within 10 optimizer steps",
    "WF_100": "the largest fall within 100 steps",
    "WP_100": "the largest rise within 100 steps",
    "LCA": "mean score on a task over its first 10 steps",
}
VERDICTS = {
    "correct": "right",
    "wrong_format": "right content, wrong form (recoverable)",
    "wrong_content": "right form, wrong content",
    "wrong_both": "wrong form, and no right content found in it",
}
_UNSCORED = {
    "absent": "answers came without reasoning (0)",
    "cut": "were cut off while reasoning (no score)",
    "unreadable": "got no readable verdict (no score)",
    "refused": "were not taken by the judge (no score)",
}
_MOSTLY = 2 / 3  # of a loss: from here on it is called mostly one thing
_LITTLE = 3.0  # points: a change of a mean that is not worth a sentence of alarm


class Drop(NamedTuple):
    """What one task lost from when it was learned to the last stage."""

    task: str
    learned: float  # score, 0–100
    final: float
    stage: int  # with which the largest single step of it came
    stage_name: str

    @property
    def points(self) -> float:
        """How much."""
        return self.learned - self.final


def headline(result: Mapping[str, Any]) -> str:
    """One sentence: which task was forgotten most, when, and whether it was form or knowledge that went."""
    drop = worst_drop(result)
    if drop is None:
        return _nothing_lost([len(_since_learned(result, i)) for i in range(len(result["tasks"]))])
    when = f"mostly after stage {drop.stage} ({drop.stage_name})"
    return f"Forgot most: {drop.task}, from {drop.learned:.1f} to {drop.final:.1f}, {when}{_nature(result, drop.task)}."


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What else there is to say of a run, the most important first."""
    return [text for text in (_levels(result), _old_answers(result), _reasoning(result), _general(result)) if text]


def worst_drop(result: Mapping[str, Any]) -> Drop | None:
    """The task that lost most since it was learned; None if none lost anything."""
    drops = [drop for drop in (_drop(result, i) for i in range(len(result["tasks"]))) if drop]
    return max(drops, key=lambda drop: drop.points, default=None)


def old_task_verdicts(result: Mapping[str, Any]) -> dict[str, float] | None:
    """Mean verdict shares (0–1), after the last stage, of the tasks learned before it; None if there are none."""
    last = len(result["stages"]) - 1
    cells = [
        result["verdicts"][last][i]
        for i, task in enumerate(result["tasks"])
        if result["learned"].get(task["name"], last) < result["stages"][last]["k"]
    ]
    cells = [cell for cell in cells if cell]
    if not cells:
        return None
    return {verdict: sum(cell[verdict] for cell in cells) / len(cells) for verdict in VERDICTS}


def bounds_of(result: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """The 95 % interval of a metric over other test samples, where it has one."""
    mean = (result.get("forgetting") or {}).get("mean") or {}
    found = result.get("intervals", {}).get(metric) or (
        mean.get(metric) if metric in ("essential", "superficial") else None
    )
    return (found["low"], found["high"]) if found and found["low"] is not None else None


def with_bounds(value: float | None, bounds: tuple[float, float] | None, digits: int = 1) -> str:
    """`61.6 [58.9, 64.2]`, or a dash for what is undefined."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "")


def shown(interval: Interval | None) -> str:
    """`71.3 ± 2.1`, half of the interval's width after the sign, or the mean alone where there is no interval."""
    if interval is None:
        return "–"
    half = None if interval["high"] is None else interval["high"] - interval["mean"]
    return f"{interval['mean']:.1f}" if half is None else f"{interval['mean']:.1f} ± {half:.1f}"


def signed(found: Mapping[str, Any], key: str = "difference") -> str:
    """`+3.1 [+0.4, +5.9]`."""
    bounds = "" if found["low"] is None else f" [{found['low']:+.1f}, {found['high']:+.1f}]"
    return f"{found[key]:+.1f}{bounds}"


def difference_sentence(first: str, name: str, comparison: Mapping[str, Any]) -> str:
    """How one run differs from a first one: where it ends, and what it forgets. `comparison` is by `compare_runs`."""
    if not comparison["MFN"]:
        return f"{name} and {first} have not learned and answered the same tasks: only single tasks compare."
    level = _told_apart(comparison["MFN"], "ends higher than", "ends lower than", "ends where it cannot be told from")
    text = f"{name} {level} {first} (mean score {signed(comparison['MFN'])})"
    if not comparison["BWT"]:
        return f"{text}."
    kept = _told_apart(
        comparison["BWT"], "forgets less", "forgets more", "forgets no more and no less that can be told"
    )
    return f"{text} and {kept} (change since learned {signed(comparison['BWT'])})."


def unscored(result: Mapping[str, Any]) -> str:
    """What became of reasoning that has no score, or none to score; empty where all of it has one."""
    cells = [cell for row in (result.get("reasoning") or {}).get("outcomes", ()) for cell in row if cell]
    counts = {key: sum(cell[key] for cell in cells) for key in _UNSCORED}
    return "; ".join(f"{counts[key]} {meaning}" for key, meaning in _UNSCORED.items() if counts[key])


def provenance(result: Mapping[str, Any]) -> dict[str, Any]:
    """Where the figures come from: method, seed, versions and hashes."""
    return {
        "method": ", ".join(result["method"]) or "sequential (none)",
        "seed": result["seed"],
        **_engines(result),
        **{key: value for key, value in result["versions"].items() if value},
        **{f"{key} hash": value[:16] for key, value in result["hashes"].items() if isinstance(value, str)},
    }


def _engines(result: Mapping[str, Any]) -> dict[str, str]:
    """Which engine answered which stages, with the largest log-prob gap to transformers."""
    found: dict[str, list[int]] = {}
    for stage, served in zip(result["stages"], result.get("served") or [], strict=False):
        for name in served["engines"]:
            found.setdefault(name, []).append(stage["k"])
    lines = {f"answers by {name}": f"stages {', '.join(map(str, stages))}" for name, stages in found.items()}
    gaps = [served["log_prob_gap"] for served in result.get("served") or [] if served["log_prob_gap"] is not None]
    return {**lines, "largest log-prob gap to transformers": f"{max(gaps):.1e} nats"} if gaps else lines


def _nothing_lost(looks: Sequence[int]) -> str:
    """What to say where no loss was seen; `looks`: how often each task was scored from the stage that learned it on."""
    if max(looks, default=0) > 1:
        return "No task lost anything by the last stage."
    if not any(looks):
        return "No task has been learned and scored yet."
    return "One task was learned." if len(looks) == 1 else "No task has been scored again since it was learned."


def _since_learned(result: Mapping[str, Any], place: int) -> list[tuple[int, float]]:
    """(row, score) of a task from the stage that learned it on."""
    learned = result["learned"].get(result["tasks"][place]["name"])
    rows = [r for r, stage in enumerate(result["stages"]) if learned is not None and stage["k"] >= learned]
    return [(r, result["matrix"][r][place]) for r in rows if result["matrix"][r][place] is not None]


def _drop(result: Mapping[str, Any], place: int) -> Drop | None:
    task, stages = result["tasks"][place]["name"], result["stages"]
    column = _since_learned(result, place)
    if len(column) < 2 or column[-1][1] >= column[0][1]:
        return None
    _, row = max((before[1] - after[1], after[0]) for before, after in itertools.pairwise(column))
    return Drop(task, column[0][1], column[-1][1], stages[row]["k"], stages[row]["name"])


def _nature(result: Mapping[str, Any], task: str) -> str:
    """Whether what a task lost is form or knowledge, by the constrained answers; nothing where they were not asked."""
    split = (result.get("forgetting") or {}).get("tasks", {}).get(task)
    if not split or split["loss"]["value"] <= 0:
        return ""
    essential, superficial = (split[part]["value"] / split["loss"]["value"] for part in ("essential", "superficial"))
    if superficial >= _MOSTLY:
        return ", mostly form: ASD is made for that"
    if essential >= _MOSTLY:
        return ", mostly knowledge: replay and regularisation are made for that"
    return ", form and knowledge alike"


def _levels(result: Mapping[str, Any]) -> str | None:
    fresh, final = (result["metrics"].get(name) for name in ("MFT", "MFN"))
    if fresh is None or final is None:
        return None
    shown = with_bounds(final, bounds_of(result, "MFN"))
    return (
        f"Right after being learned the tasks scored {fresh:.1f} on average; after the last stage they score {shown}."
    )


def _old_answers(result: Mapping[str, Any]) -> str | None:
    """How the final answers on earlier tasks are wrong, and what of it is lost knowledge."""
    shares = old_task_verdicts(result)
    if not shares or shares["correct"] == 1:
        return None
    wrong = 1 - shares["correct"]
    text = (
        f"On the tasks of earlier stages, {100 * wrong:.0f} % of the final answers are wrong: "
        f"{100 * shares['wrong_format']:.0f} % only in form, {100 * shares['wrong_content']:.0f} % only in content, "
        f"{100 * shares['wrong_both']:.0f} % in both."
    )
    split = (result.get("forgetting") or {}).get("mean")
    if split and split["loss"]["value"] > 0:
        loss, essential, superficial = (split[part]["value"] for part in ("loss", "essential", "superficial"))
        return (
            f"{text} Above chance they lost {loss:.1f} points: {essential:.1f} are essential, gone from answers held "
            f"to the form too; {superficial:.1f} are superficial."
        )
    if not worst_drop(result):
        return text
    if shares["wrong_format"] + shares["wrong_both"] > wrong / 2:
        return f"{text} Most of them are in a foreign answer style, which is what ASD is made against."
    return f"{text} Most of them have the right form: knowledge, not style, is what was lost."


def _reasoning(result: Mapping[str, Any]) -> str | None:
    """Which of reasoning and answers lost less, if that can be told."""
    lost = (result.get("reasoning") or {}).get("mean")
    if not lost:
        return None
    said = f"Since they were learned, earlier tasks lost {lost['reasoning']['value']:.1f} points of reasoning and "
    said += f"{lost['answer']['value']:.1f} of answers"
    if not (kept := lost["difference"]):
        return f"{said}; of one of the two nothing had been learned."
    shares = "{:.0f} % of the reasoning is left and {:.0f} % of the answers".format(
        *(lost[part]["value"] for part in ("reasoning_kept", "answer_kept"))
    )
    found = {"difference": kept["value"], "low": kept["low"], "high": kept["high"]}
    told = _told_apart(
        found, "reasoning outlived answers", "answers outlived reasoning", "the two cannot be told apart"
    )
    return f"{said}; {shares}: {told}."


def _general(result: Mapping[str, Any]) -> str | None:
    """What became of the general ability."""
    now, before = (result["metrics"].get(name) for name in ("general", "general_base"))
    if now is None or before is None:
        return None
    word = "kept" if now >= before - _LITTLE else "lost"
    return f"General ability was {word}: {before:.1f} for the untouched base, {now:.1f} after the last stage."


def _told_apart(found: Mapping[str, Any], more: str, less: str, neither: str) -> str:
    """Which of the three a difference is, by whether its interval leaves out 0."""
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return neither
    return more if found["difference"] > 0 else less
