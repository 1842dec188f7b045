"""An adapter is proved to act, or evaluation stops."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from serving import base_policy, lora_policy, make_images

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy, Request, Scored
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.liveness import engine_scores, is_zero, log_prob_gap, prove, transformers_scores, unproven

CONFIG = EvalConfig()


class Forgetful(TransformersEngine):
    """Loads adapters and does not apply them: what vLLM did with towers, and lm-eval with adapters."""

    def _active(self, policy: Policy) -> Any:
        return self.model.disable_adapter()


class Mistaken(TransformersEngine):
    """Applies an adapter, but always the same."""

    def _active(self, policy: Policy) -> Any:
        if policy.adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(min(self.adapters))
        return nullcontext()


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    return tmp_path / "stages"


def probes(folder: Path, policy: Policy) -> list[Request]:
    [image] = make_images(folder, 1)
    return [
        Request([{"role": "user", "content": "Which colour?"}], [image], policy, completion="red"),
        Request([{"role": "user", "content": "2 + 2 = ?"}], [], policy, completion="4"),
    ]


def proved(engine: TransformersEngine, policies: Sequence[Policy], asked: Sequence[Request]) -> Any:
    """`prove` with `engine` in vLLM's place."""
    served = engine_scores(engine, [policies[0].base(), *policies], asked)
    return prove(policies, "vllm", served, transformers_scores(policies, asked, CONFIG), CONFIG)


def test_a_live_adapter_passes_once(stages: Path, tmp_path: Path) -> None:
    policies = [base_policy(stages), lora_policy(stages, 1, "live", 4)]
    asked = probes(tmp_path, policies[0])
    assert unproven(policies, "vllm", CONFIG) == policies
    base, live = proved(TransformersEngine(policies, CONFIG), policies, asked)
    assert base["effect"] is None and base["gap"] == 0
    assert live["ok"] and live["effect"] > 0.01 and live["effect"] == live["effect_transformers"]
    assert read_json(policies[1].folder / "liveness.json") == live
    assert live["note"].startswith("stage 1 (live): acts (up to ")
    assert unproven(policies, "vllm", CONFIG) == []
    assert unproven(policies, "transformers", CONFIG) == policies
    policies[1].serving.hash = "another"
    assert unproven(policies, "vllm", CONFIG) == [policies[1]]


def test_an_engine_that_drops_adapters_is_found_out(stages: Path, tmp_path: Path) -> None:
    policies = [lora_policy(stages, 1, "dropped", 4)]
    with pytest.raises(InputError, match=r"stage 1 \(dropped\): vllm and transformers differ by .* nats a token"):
        proved(Forgetful(policies, CONFIG), policies, probes(tmp_path, policies[0]))
    written = read_json(policies[0].folder / "liveness.json")
    assert not written["ok"] and written["effect"] == 0 and written["gap"] > CONFIG.parity_tolerance
    assert unproven(policies, "vllm", CONFIG) == policies


def test_an_adapter_without_effect_fails_even_where_nothing_else_is_compared(stages: Path, tmp_path: Path) -> None:
    policies = [lora_policy(stages, 1, "dropped", 4)]
    asked = probes(tmp_path, policies[0])
    served = engine_scores(Forgetful(policies, CONFIG), [policies[0].base(), *policies], asked)
    with pytest.raises(InputError, match="changes no log-probability by more than"):
        prove(policies, "transformers", served, None, CONFIG)


def test_an_engine_that_mixes_adapters_up_is_found_out(stages: Path, tmp_path: Path) -> None:
    policies = [lora_policy(stages, 1, "first", 4), lora_policy(stages, 2, "second", 4)]
    with pytest.raises(InputError, match=r"stage 2 \(second\): vllm and transformers differ"):
        proved(Mistaken(policies, CONFIG), policies, probes(tmp_path, policies[0]))
    assert read_json(policies[0].folder / "liveness.json")["ok"]


def test_a_zero_adapter_is_reported_and_passes(stages: Path, tmp_path: Path) -> None:
    policies = [lora_policy(stages, 1, "zero", 4, zero=True)]
    [result] = proved(TransformersEngine(policies, CONFIG), policies, probes(tmp_path, policies[0]))
    assert result["ok"] and result["zero"] and result["effect"] == 0
    assert result["note"] == "stage 1 (zero): the adapter is exactly zero, so this is the base model"
    assert not is_zero(lora_policy(stages, 2, "live", 4))
    assert not is_zero(base_policy(stages))


def test_prompts_that_are_read_differently_are_an_error(stages: Path, tmp_path: Path) -> None:
    policies = [base_policy(stages)]
    asked = probes(tmp_path, policies[0])
    served = engine_scores(TransformersEngine(policies, CONFIG), policies, asked)
    longer = {key: [s._replace(prompt_ids=[5, *s.prompt_ids]) for s in scores] for key, scores in served.items()}
    with pytest.raises(InputError, match=r"prompt of \d+ tokens, transformers of \d+: they read images"):
        prove(policies, "vllm", served, longer, CONFIG)


def test_the_gap_is_the_largest_in_float32_and_the_mean_in_16_bits() -> None:
    ours = [Scored([1], [-1.0, -2.0]), Scored([1], [-3.0])]
    theirs = [Scored([1], [-1.5, -2.1]), Scored([1], [-3.2])]
    assert log_prob_gap(ours, theirs, "float32") == pytest.approx((0.5, 0.5))
    assert log_prob_gap(ours, theirs, "bfloat16") == pytest.approx((0.8 / 3, 0.5))


def test_a_stricter_tolerance_asks_for_a_new_proof(stages: Path, tmp_path: Path) -> None:
    policies = [base_policy(stages)]
    asked = probes(tmp_path, policies[0])
    served = engine_scores(TransformersEngine(policies, CONFIG), policies, asked)
    nearly = {
        key: [s._replace(logprobs=[x + 0.01 for x in s.logprobs]) for s in scores] for key, scores in served.items()
    }
    prove(policies, "vllm", served, nearly, CONFIG)
    assert unproven(policies, "vllm", EvalConfig(parity_tolerance=0.02)) == []
    assert unproven(policies, "vllm", EvalConfig(parity_tolerance=0.005)) == policies
