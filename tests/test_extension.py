"""Experts and prompts in the untouched base: by hand, by brute force, and as an engine serves them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import TINY, make_samples, tiny_model, tiny_processor, write_images

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_json
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Request, generate, make_engine, read_policy
from mcit.eval.extension import MixtureLinear, PromptPool, add_mixtures, add_prompts, extend, save_extension
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, write_serving
from mcit.pipeline.training.collator import Collator


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_experts_are_weighted_token_by_token() -> None:
    linear = nn.Linear(6, 5)
    a, b, router = draw(4, 6), draw(5, 4, seed=1), draw(2, 6, seed=2)
    layer, x = MixtureLinear(linear, a, b, router, 0.5), draw(3, 7, 6, seed=3)
    for i in range(3):
        for t in range(7):
            shares = (router @ x[i, t]).softmax(0)
            experts = [b[:, 2 * e : 2 * e + 2] @ a[2 * e : 2 * e + 2] @ x[i, t] for e in range(2)]
            expected = linear(x[i, t]) + 0.5 * (shares[0] * experts[0] + shares[1] * experts[1])
            torch.testing.assert_close(layer(x)[i, t], expected)


def test_one_expert_is_lora() -> None:
    linear = nn.Linear(6, 5)
    a, b, x = draw(4, 6), draw(5, 4, seed=1), draw(3, 6, seed=2)
    torch.testing.assert_close(MixtureLinear(linear, a, b, draw(1, 6), 2.0)(x), linear(x) + 2 * x @ a.T @ b.T)


def test_a_question_picks_the_prompts_with_the_nearest_keys() -> None:
    """Its mean embedding is (1, 1) · 1.5, without what is masked; cosines are 0.71, 0, −1 and 1."""
    keys = torch.tensor([[5.0, 0.0], [1.0, -1.0], [-2.0, -2.0], [0.1, 0.1]])
    pool = PromptPool(keys, torch.arange(8.0).view(4, 2, 1).expand(4, 2, 2), top=2)
    embeddings = torch.tensor([[[9.0, -9.0], [2.0, 1.0], [1.0, 2.0]]])
    found = pool(embeddings, torch.tensor([[0, 1, 1]]))
    assert found[0, :, 0].tolist() == [6, 7, 0, 1]
    assert pool.likeness is not None and pool.likeness.item() == pytest.approx((1 + 0.5**0.5) / 2, abs=1e-6)


def extension(kind: str, folder: Path) -> None:
    """One that visibly changes the tiny model."""
    model = tiny_model()
    units = model.get_input_embeddings().weight.shape[1]
    if kind == "prompts":
        tensors = {"keys": draw(6, units), "prompts": draw(6, 3, units, seed=1)}
        save_extension(folder, {"kind": kind, "top": 2}, tensors)
        return
    tensors = {}
    for name in ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.mlp.down_proj"):
        rows, columns = model.get_submodule(name).weight.shape
        a, b = draw(4, columns, scale=0.3), draw(rows, 4, seed=1, scale=0.3)
        tensors |= {f"{name}.a": a, f"{name}.b": b, f"{name}.router": draw(2, columns)}
    save_extension(folder, {"kind": kind, "scaling": 0.5}, tensors)


@pytest.mark.parametrize("images", [1, 0])
def test_prompts_are_as_if_they_had_been_embedded(tmp_path: Path, images: int) -> None:
    """The decoder alone, given prompts and question as one sequence of embeddings, says the same."""
    write_images(tmp_path)
    extension("prompts", tmp_path / "x")
    samples = make_samples("t", 3, images=images)
    for sample in samples:
        sample["images"] = [str(tmp_path / path) for path in sample["images"]]
    batch = Collator(tiny_processor(), [], 512).collate(samples)
    del batch["labels"]
    plain, extended = tiny_model().eval(), tiny_model().eval()
    extend(extended, tmp_path / "x")
    caught: dict[str, Any] = {}
    hook = plain.get_decoder().register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    with torch.no_grad():
        before = plain(**batch).logits
        hook.remove()
        prompts = extended.get_decoder().prompt_pool(caught["inputs_embeds"], batch["attention_mask"])
        places = caught.get("position_ids")
        if places is not None:
            prefix = torch.arange(prompts.shape[1]).expand(*places.shape[:-1], -1)
            places = torch.cat([prefix, places + prompts.shape[1]], -1)
        whole = plain.get_decoder()(
            inputs_embeds=torch.cat([prompts, caught["inputs_embeds"]], 1),
            attention_mask=torch.cat(
                [batch["attention_mask"].new_ones(3, prompts.shape[1]), batch["attention_mask"]], 1
            ),
            position_ids=places,
        ).last_hidden_state
        expected = plain.get_output_embeddings()(whole[:, prompts.shape[1] :])
        found = extended(**batch).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert (found - before)[mask].abs().max() > 0.01


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A stage whose policy is an extension."""
    write_images(tmp_path)
    extension(request.param, tmp_path / "extended")
    serving = Serving(
        stage=1,
        name="t",
        kind="extended",
        base=str(TINY),
        dtype="float32",
        path="extended",
        base_hash=hash_model(str(TINY)),
        hash=hash_model(str(tmp_path / "extended")),
    )
    write_serving(tmp_path, serving)
    return tmp_path


@pytest.mark.parametrize("stage", ["mixture", "prompts"], indirect=True)
@pytest.mark.parametrize("images", [1, 0])
def test_answers_are_those_of_one_token_after_the_other(stage: Path, images: int) -> None:
    """Without a cache and without padding, each next token from a whole pass: what a batch with a cache must equal."""
    policy = read_policy(stage)
    engine = make_engine([policy], EvalConfig(engine="transformers"), images)
    samples = make_samples("t", 4, images=images)
    samples[0]["prompt"][0]["content"] += " Say it again and again."  # so that the others are padded
    requests = [Request(one["prompt"], [stage / path for path in one["images"]], policy) for one in samples]
    answers = generate(engine, requests, 8)
    model, processor = tiny_model().eval(), tiny_processor()
    extend(model, stage / "extended")
    for sample, answer in zip(samples, answers, strict=True):
        sample["images"] = [str(stage / path) for path in sample["images"]]
        sample["completion"] = [{"role": "assistant", "content": ""}]
        batch = Collator(processor, [], 512).collate([sample])
        prompt = int((batch["labels"] == -100).sum())
        batch = {
            key: value[:, :prompt] if value.shape[:2] == batch["labels"].shape else value
            for key, value in batch.items()
        }
        del batch["labels"]
        batch["labels"] = torch.full_like(batch["input_ids"], -100)  # they say where the question ends
        ids: list[int] = []
        for _ in range(answer.tokens):
            with torch.no_grad():
                ids.append(int(model(**batch).logits[0, -1].argmax()))
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids[-1:]])], 1)
            for key, value in batch.items():
                if key != "input_ids" and value.shape == (1, batch["input_ids"].shape[1] - 1):
                    last = {"attention_mask": 1, "labels": ids[-1]}.get(key, 0)
                    batch[key] = torch.cat([value, torch.tensor([[last]])], 1)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.text.strip()
    engine.close()


@pytest.mark.parametrize("stage", ["mixture"], indirect=True)
def test_vllm_says_that_it_cannot_and_transformers_serves(stage: Path) -> None:
    policy, said = read_policy(stage), list[str]()
    with pytest.raises(InputError, match=r"eval.engine: (it has no layers of a method's own|vLLM is not installed)"):
        make_engine([policy], EvalConfig(engine="vllm"), 0)
    engine = make_engine([policy], EvalConfig(engine="auto"), 0, say=said.append)
    assert engine.name == "transformers" and len(said) == 1
    with pytest.raises(KeyError):  # the base is another policy, and not in this engine
        engine.logprobs([Request(make_samples("t", 1, images=0)[0]["prompt"], [], policy.base(), "red")])
    engine.close()


def test_an_unknown_extension_is_refused(tmp_path: Path) -> None:
    save_extension(tmp_path / "x", {"kind": "mixture", "scaling": 1.0}, {})
    write_json(tmp_path / "x" / "config.json", {"kind": "sorcery"})
    with pytest.raises(InputError, match=r"config.json: kind: is of an unknown kind, 'sorcery'"):
        extend(tiny_model(), tmp_path / "x")


def test_what_is_put_in_can_be_read_back() -> None:
    model = tiny_model()
    name = "model.language_model.layers.0.self_attn.q_proj"
    rows, columns = model.get_submodule(name).weight.shape
    tensors = {f"{name}.a": draw(4, columns), f"{name}.b": draw(rows, 4), f"{name}.router": draw(2, columns)}
    layers = add_mixtures(model, tensors, 1.0)
    assert set(layers) == {name} and model.get_submodule(name) is layers[name]
    units = model.get_input_embeddings().weight.shape[1]
    pool = add_prompts(model, {"keys": draw(2, units), "prompts": draw(2, 3, units)}, 1)
    assert pool.count == 3 and {f"model.language_model.prompt_pool.{part}" for part in ("keys", "prompts")} <= set(
        dict(model.named_parameters())
    )
