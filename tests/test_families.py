"""Any vision-language model: tiny random ones of each family train, reload, answer with live adapters, and reinforce.

docs/models.md is the table of what these tests show.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, FAMILIES
from peft import PeftModel
from safetensors.torch import load_file
from training import COLOURS, make_run, make_samples, random_adapter
from transformers import AutoModelForImageTextToText, AutoProcessor

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy, Request, generate, make_engine, read_policy
from mcit.eval.engines.merging import write_merged
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.engines.vllm import VllmEngine
from mcit.eval.liveness import Liveness, engine_scores, prove, transformers_scores
from mcit.eval.lora import load_adapter
from mcit.eval.serving import Serving, write_serving
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.collator import Collator

VLLM = EvalConfig(engine="vllm", max_model_len=256)
RECIPE = """
  - [colour, words]
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 4
  sft: {args: {learning_rate: 2e-2, lr_scheduler_type: constant, max_steps: 2, logging_steps: 1}}
"""
STAGES = ("00-base", "01-colour", "02-words", "03-colour+words")


def sparing(names: Sequence[str], fast: str) -> list[Any]:
    """All families as parameters, all but one for the slow suite."""
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def train(run: Path, recipe: Path, k: int, *overrides: str, script: Any = sft) -> PeftModel:
    """Train a stage in this process; the model as training left it."""
    kept: dict[str, Any] = {}

    def make(entered: Any) -> Any:
        kept["model"] = entered.model
        return script.make_trainer(entered)

    run_stage(load_recipe(recipe, overrides), k, run, script.__name__.rpartition(".")[2], make)
    return kept["model"].eval()


def trained_run(family: str, folder: Path) -> list[Policy]:
    """Three stages, on two images a sample, on text, on both mixed; what is saved reloads as it was left."""
    base, run = folder / "base", folder / "run"
    FAMILIES[family](base)
    tasks = {"colour": make_samples("colour", 8, images=2), "words": make_samples("words", 8, images=0)}
    recipe = make_run(run, tasks, RECIPE, base)
    samples = tasks["colour"][:2]
    shown = [{**s, "images": [str(run / "data" / "colour" / image) for image in s["images"]]} for s in samples]
    batch = Collator(AutoProcessor.from_pretrained(base), [], 256).collate(shown)  # type: ignore[arg-type]
    for k, name in enumerate(STAGES[1:], 1):
        model = train(run, recipe, k)
        fresh = AutoModelForImageTextToText.from_pretrained(base)
        loaded = PeftModel.from_pretrained(fresh, run / "stages" / name / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)
    return [read_policy(run / "stages" / name) for name in STAGES]


def questions(policy: Policy) -> list[Request]:
    """A question without, with one and with two images, and one with another image."""
    folder = policy.folder.parents[1] / "data" / "colour" / "images"
    red, blue = folder / "red-1.png", folder / "blue-1.png"
    prompt = [{"role": "user", "content": "Which colour?"}]
    shown = [[], [red], [blue], [red, blue]]
    return [Request(prompt, images, policy, completion="red or blue") for images in shown]  # type: ignore[arg-type]


def proved(policies: list[Policy]) -> list[Liveness]:
    """The proof of vLLM's answers, which are those of transformers; raises `InputError` if they are not."""
    asked = questions(policies[0])
    reference = transformers_scores(policies, asked, VLLM)
    everything = [request._replace(policy=policy) for policy in policies for request in asked]
    engine = make_engine(policies, VLLM, max_images=2)
    assert isinstance(engine, VllmEngine)
    try:
        proofs = prove(policies, "vllm", engine_scores(engine, policies, asked), reference, VLLM)
        assert generate(engine, everything, 8) == generate(TransformersEngine(policies, VLLM), everything, 8)
    finally:
        engine.close()
    red, blue = (reference[policies[0].serving.hash][i].logprobs for i in (1, 2))
    assert max(abs(a - b) for a, b in zip(red, blue, strict=True)) > 0.1  # or nothing is shown about images
    return proofs


@pytest.mark.parametrize("family", sparing([name for name in DENSE if name != "gemma3"], fast="llava"))
def test_stages_train_reload_and_answer_through_vllm(family: str, tmp_path: Path) -> None:
    base, *adapters = proved(trained_run(family, tmp_path))
    assert base["gap_max"] < 1e-4
    for proof in adapters:
        assert proof["effect"] > 0.01 and proof["gap_max"] < 1e-4


def proved_with_transformers(policies: list[Policy]) -> None:
    asked = questions(policies[0])
    scores = transformers_scores(policies, asked, VLLM)
    assert all(proof["effect"] > 0.01 for proof in prove(policies, "transformers", scores, None, VLLM)[1:])


@pytest.mark.slow
def test_gemma_3_answers_through_transformers_and_vllm_is_found_out_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's image tokens see each other; vLLM's attention on a CPU is causal there, which the proof notices."""
    policies = trained_run("gemma3", tmp_path)
    proved_with_transformers(policies)
    with pytest.raises(InputError, match=r"the base: vllm and transformers differ by 0\.\d+ nats a token"):
        proved(policies)
    inputs = TransformersEngine._inputs

    def causal(*args: Any) -> Any:
        made = inputs(*args)
        made.pop("token_type_ids")
        return made

    monkeypatch.setattr(TransformersEngine, "_inputs", causal)
    assert all(proof["gap_max"] < 1e-4 for proof in proved(policies))


@pytest.mark.slow
def test_a_mixture_of_experts_answers_through_transformers(tmp_path: Path) -> None:
    policies = trained_run("qwen3_vl_moe", tmp_path)
    assert {name.rpartition(".")[2] for name in load_adapter(policies[1].folder / "adapter")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }  # the experts are no linear layers
    proved_with_transformers(policies)
    said: list[str] = []
    assert make_engine(policies, EvalConfig(max_model_len=256), 2, said.append).name == "transformers"
    assert said[0].endswith("slower: vLLM has no LoRA for mixtures of experts on a CPU")


def merged_policies(family: str, folder: Path) -> list[Policy]:
    """The base, and a merged model."""
    base, stages = folder / "base", folder / "run" / "stages"
    FAMILIES[family](base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "o_proj")) and "vision" not in name]
    common = {"base": str(base), "dtype": "float32", "base_hash": "b"}
    row0 = Serving(stage=0, name="base", kind="base", hash="b", **common)
    write_merged(row0, random_adapter(model, names, 2, seed=0), stages / "01-merged" / "merged")
    merged = Serving(stage=1, name="merged", kind="merged", path="merged", hash="m", **common)
    for name, serving in (("00-base", row0), ("01-merged", merged)):
        (stages / name).mkdir(exist_ok=True)
        write_serving(stages / name, serving)
    return [read_policy(stages / name) for name in ("00-base", "01-merged")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_written_as_the_base_is(family: str, tmp_path: Path) -> None:
    base, merged = merged_policies(family, tmp_path)
    ours, theirs = (load_file(Path(policy.model) / "model.safetensors") for policy in (merged, base))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    changed = {name.split(".")[-2] for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    assert changed == {"q_proj", "o_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_a_merged_model_answers_through_vllm(family: str, tmp_path: Path) -> None:
    base, merged = merged_policies(family, tmp_path)
    asked = [request for request in questions(base) if not request.images]
    reference = transformers_scores([merged], asked, VLLM)
    engine = make_engine([merged], VLLM, 1)
    assert isinstance(engine, VllmEngine)
    try:
        [proof] = prove([merged], "vllm", engine_scores(engine, [merged], asked), reference, VLLM)
    finally:
        engine.close()
    assert proof["effect"] > 0.01 and proof["gap_max"] < 1e-4


GRPO = (
    "train.paradigm=rft",
    "train.global_batch_size=16",
    "train.rft.args={learning_rate: 1e-2, beta: 0.1, num_generations: 4, max_completion_length: 6, max_steps: 1, "
    "logging_steps: 1, temperature: 1.0, per_device_train_batch_size: 8}",
)


@pytest.mark.parametrize("family", sparing(list(FAMILIES), fast="internvl"))
def test_grpo_on_images_and_on_text(family: str, tmp_path: Path) -> None:
    """After a stage half of which was wrong, so that rewards differ; one and two images a sample."""
    base, run = tmp_path / "base", tmp_path / "run"
    FAMILIES[family](base)
    shown, told = make_samples("taught", 24, images=1), make_samples("taught", 24, images=0)
    for i, sample in enumerate([*shown, *told]):
        sample["id"] = f"taught-{i}"
        if i % 2:
            colour = COLOURS.index(sample["references"][0])
            sample["completion"] = [{"role": "assistant", "content": COLOURS[colour - 1]}]
    tasks = {"taught": [*shown, *told], "words": make_samples("words", 8, images=0)}
    tasks["colour"] = make_samples("colour", 8, images=1)
    for sample in tasks["colour"][::2]:
        sample["images"] *= 2
    recipe = make_run(run, tasks, RECIPE, base)
    train(run, recipe, 1, "train.sft.args.max_steps=40", "train.global_batch_size=16")
    for k, name in ((2, "02-words"), (3, "03-colour")):
        train(run, recipe, k, *GRPO, script=rft)
        [step, _] = read_jsonl(run / "stages" / name / "train_log.jsonl")
        assert abs(step["kl"]) < 1e-4 and step["reward_std"] > 0 and step["grad_norm"] > 0
