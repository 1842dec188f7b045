"""A base in 4 bits while it is trained on: what is saved is for the base as it is. Skips without bitsandbytes."""

import pytest
import torch
from random_model import RANDOM
from training import launch, make_run, make_samples

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.eval.config import EvalConfig
from mcit.eval.engines.base import Policy, Request
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.lora import Factors, load_adapter
from mcit.eval.serving import read_serving
from mcit.pipeline.policy.lineage import enter, stack, target_names
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import ModelConfig, ModulesConfig, TrainConfig
from mcit.pipeline.stage.entering import load_model

NF4 = ModelConfig(path=str(RANDOM), dtype="float32", quantization="nf4")
RECIPE = """
train: {lora: {r: 4, alpha: 8, dropout: 0}, global_batch_size: 4, lineage: stack,
  sft: {args: {max_steps: 4, learning_rate: 0.01, gradient_checkpointing: true}}}
"""


def test_only_the_language_model_s_linear_layers_are_quantised():
    model, plain = load_model(NF4), load_model(NF4.model_copy(update={"quantization": "none"}))
    language = set(target_names(plain, ModulesConfig()))
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantised == language and set(target_names(model, ModulesConfig())) == language
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    for name in theirs.keys() - {f"{name}.weight" for name in language}:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_past_acts_beside_quantised_weights_and_gradients_reach_the_lora():
    """Also after the model was asked in evaluation mode, in which bitsandbytes would pack its weights on a CPU."""
    model = load_model(NF4)
    inputs = {"input_ids": torch.arange(2, 18)[None], "attention_mask": torch.ones(1, 16, dtype=torch.long)}
    names = target_names(model, ModulesConfig())
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    generator = torch.Generator().manual_seed(0)
    past = {}
    for name in names:
        linear = model.get_submodule(name)
        a = torch.randn(2, linear.in_features, generator=generator) * 0.1
        past[name] = Factors(a, torch.randn(linear.out_features, 2, generator=generator) * 0.1, 0.5)
    x = torch.randn(3, model.get_submodule(names[0]).in_features, generator=generator)
    plain = model.get_submodule(names[0])(x)
    stack(model, past)
    factors = past[names[0]]
    assert torch.allclose(model.get_submodule(names[0])(x), plain + x @ factors.delta().T, atol=1e-5)
    with torch.no_grad():
        assert (model(**inputs).logits - before).abs().max() > 0.01
    peft = enter(model, None, TrainConfig.model_validate({"lora": {"r": 2, "alpha": 4, "dropout": 0.0}}))
    peft.train()
    peft(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.any() for name, p in trained.items() if "lora_B" in name)


def test_stages_train_on_a_quantised_base_and_are_served_on_the_base_as_it_is(tmp_path):
    tasks = {name: make_samples(name, 8, seed=seed) for seed, name in enumerate(("colours", "words"))}
    recipe = make_run(tmp_path / "run", tasks, RECIPE, RANDOM)
    for stage in (1, 2):
        launch(tmp_path / "run", recipe, "single", 1, "base_model.quantization=nf4", stage=stage)
    folder = tmp_path / "run" / "stages" / "02-words"
    serving = read_serving(folder)
    assert serving.kind == "adapter" and serving.rank == 8 and serving.dtype == "float32"
    assert read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(RANDOM)
    first = load_adapter(tmp_path / "run" / "stages" / "01-colours" / "adapter")
    both = load_adapter(folder / "adapter")
    assert all(torch.equal(both[name].a[:4], first[name].a) for name in first)  # the past is frozen
    policy = Policy(serving, folder)
    engine = TransformersEngine([policy], EvalConfig(engine="transformers"))
    request = Request(tasks["words"][0]["prompt"], [tmp_path / "run/data/words/images/red-0.png"], policy, "red")
    with_adapter, without = engine.logprobs([request, request._replace(policy=policy.base())])
    assert max(abs(a - b) for a, b in zip(with_adapter.logprobs, without.logprobs, strict=True)) > 0.01
    assert sum(with_adapter.logprobs) > sum(without.logprobs)  # what it learned beside 4 bits holds beside 32


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.lineage=fold"], "base_model.quantization: a quantised base cannot be folded into"),
        (["train.lineage=full"], "base_model.quantization: a quantised base cannot be trained whole"),
        (["method.moextend={}"], "base_model.quantization: moextend trains weights of the base"),
    ],
)
def test_what_needs_the_weights_as_numbers_is_refused(overrides, line):
    with pytest.raises(InputError, match=line):
        load_recipe("mini/sequential", ["base_model.quantization=nf4", *overrides])


def test_without_bitsandbytes_it_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"base_model\.quantization: needs bitsandbytes\. pip install bitsandbytes"):
        load_recipe("mini/sequential", ["base_model.quantization=nf4"])
