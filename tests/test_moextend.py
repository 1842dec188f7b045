"""MoExtend's parts: experts beside a mixture against brute force and against the merged model, usage, and selection."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save_llava_mixtral
from training import tiny_model
from transformers import AutoModelForImageTextToText

from mcit.data_prep.errors import InputError
from mcit.pipeline.methods import build_methods
from mcit.pipeline.methods.moextend import MoExtendConfig
from mcit.pipeline.methods.moextend.experts import Added, append, copies, count, extend, merge, nudged, trained
from mcit.pipeline.methods.moextend.models import blocks_of, expert_bytes
from mcit.pipeline.methods.moextend.usage import least_used, most_shifted, most_used, shift, shifted_usage, usage
from mcit.pipeline.recipe.schema import TrainConfig

KERNELS = ("eager", "grouped_mm", "batched_mm")
MIXTURES = {name: FAMILIES.get(name, save_llava_mixtral) for name in ("qwen3_vl_moe", "llava_mixtral", "qwen3_vl")}
IDS = torch.randint(10, 200, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in (*MIXTURES, "llava")}
    for name, folder in made.items():
        (MIXTURES | FAMILIES)[name](folder)
    return made


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def opened(folder: Path, kernel: str = "grouped_mm") -> tuple[Any, dict[int, Any]]:
    """A model and its mixtures; in the dense one, layer 1 becomes one."""
    model = load(folder)
    blocks = blocks_of(model, [1] if model.config.model_type == "qwen3_vl" else "all")
    for block in blocks.values():
        block.experts.config._experts_implementation = kernel
    return model, blocks


def extended(folder: Path, kernel: str = "grouped_mm", k: int = 2) -> tuple[Any, dict[int, Any]]:
    """The same with `k` new experts in each, far from what they were copied from."""
    model, blocks = opened(folder, kernel)
    torch.manual_seed(1)
    for block in blocks.values():
        extend(block, nudged(copies(block, most_used(torch.ones(count(block)), k)), block))
        for parameter in (*block.experts.new.parameters(), block.gate.rows):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, blocks


def loss(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_beside_the_mixture_is_in_the_mixture(folders: dict[str, Path], name: str, kernel: str) -> None:
    """Outputs and gradients are those of the model that holds all experts, by each of transformers' kernels."""
    model, blocks = extended(folders[name], kernel)
    before = model(input_ids=IDS).logits
    loss(model).backward()
    grads = {
        layer: [parameter.grad for parameter in (block.experts.new.gate_up_proj, block.experts.new.down_proj)]
        + [block.gate.rows.grad]
        for layer, block in blocks.items()
    }
    assert {id(p) for p in model.parameters() if p.grad is not None} == {
        id(p) for block in blocks.values() for p in (*block.experts.new.parameters(), block.gate.rows)
    }
    for block in blocks.values():
        merge(block)
    assert not any(hasattr(module, "rows") or hasattr(module, "new") for module in model.modules())
    after = model.requires_grad_(True)(input_ids=IDS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    loss(model).backward()
    for layer, block in blocks.items():
        own = (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
        for grad, parameter in zip(grads[layer], own, strict=True):
            assert grad.abs().max() > 1e-4
            torch.testing.assert_close(grad, parameter.grad[-2:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_extended_layer_by_hand(folders: dict[str, Path], kernel: str) -> None:
    """Token by token: the largest two of all logits, a softmax over these, and each expert's MLP."""
    _, blocks = extended(folders["qwen3_vl_moe"], kernel)
    block, states = blocks[0], torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(2))
    new, old = block.experts.new, block.experts.experts
    gate_up = torch.cat([old.gate_up_proj, new.gate_up_proj]).double()
    down = torch.cat([old.down_proj, new.down_proj]).double()
    rows = torch.cat([block.gate.router.weight, block.gate.rows]).double()
    expected, chosen = torch.zeros(50, 64, dtype=torch.float64), []
    for token, state in enumerate(states[0].double()):
        logits, experts = (rows @ state).topk(2)
        for weight, expert in zip(logits.softmax(0), experts, strict=True):
            gate, up = (gate_up[expert] @ state).chunk(2)
            expected[token] += weight * (down[expert] @ (F.silu(gate) * up))
        chosen.append(experts)
    places = torch.stack(chosen) >= 4
    assert 0.1 < places.float().mean() < 0.9
    torch.testing.assert_close(block(states)[0].double(), expected, rtol=0, atol=1e-5)

    untouched = ~places.any(1)  # as if there were no new experts
    merge(block)
    for own, parameter in ((block.experts, "gate_up_proj"), (block.experts, "down_proj"), (block.gate, "weight")):
        setattr(own, parameter, torch.nn.Parameter(getattr(own, parameter)[:4]))
    block.experts.num_experts = 4
    with torch.no_grad():
        torch.testing.assert_close(block(states)[0].double()[untouched], expected[untouched], rtol=0, atol=1e-5)


def test_appended_experts_leave_every_old_bit(folders: dict[str, Path]) -> None:
    _, blocks = opened(folders["qwen3_vl_moe"])
    block = blocks[1]
    old = [tensor.clone() for tensor in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)]
    added = copies(block, [3, 1])
    append(block, added)
    now = (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
    for tensor, before, new in zip(now, old, added, strict=True):
        assert torch.equal(tensor[:4], before) and torch.equal(tensor[4:], new) and not tensor.requires_grad
        assert torch.equal(new[0], before[3]) and torch.equal(new[1], before[1])
    assert (count(block), block.gate.num_experts) == (6, 6) and trained(block) is None


def test_experts_train_in_float32_and_are_kept_as_they_are_served(folders: dict[str, Path]) -> None:
    model = load(folders["qwen3_vl_moe"]).bfloat16()
    block = blocks_of(model, "all")[0]
    extend(block, copies(block, [0]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    block.experts.new.down_proj.data += 1e-4  # lost in bfloat16, were it the sum of many
    assert {tensor.dtype for tensor in trained(block)} == {torch.bfloat16}
    states = torch.randn(1, 9, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(4))
    beside = block(states)
    merge(block)
    assert beside.dtype == torch.bfloat16
    torch.testing.assert_close(block(states), beside, rtol=0, atol=0.02)


def test_new_rows_differ_a_little_from_their_sources_and_each_other(folders: dict[str, Path]) -> None:
    for name, size in (("qwen3_vl_moe", None), ("qwen3_vl", 1.0)):  # the row of an upcycled MLP is zero
        _, blocks = opened(folders[name])
        block = blocks[1]
        added = copies(block, [0, 0])
        torch.manual_seed(0)
        rows = nudged(added, block).rows
        scale = size or block.gate.weight.square().mean().sqrt().item()
        moved = (rows - added.rows) / scale
        assert 0.014 < moved.std() < 0.028 and not torch.equal(rows[0], rows[1])
        assert torch.equal(nudged(added, block).gate_up, added.gate_up)


def test_a_dense_model_upcycled_computes_the_same_until_it_is_trained(folders: dict[str, Path]) -> None:
    """And a router has no gradient while experts are alike: usage cannot shift, and finds no layers."""
    before = load(folders["qwen3_vl"])(input_ids=IDS).logits
    model, blocks = opened(folders["qwen3_vl"])
    assert list(blocks) == [1] and count(blocks[1]) == 1
    extend(blocks[1], nudged(copies(blocks[1], [0, 0]), blocks[1]))
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
    loss(model).backward()
    assert blocks[1].gate.rows.grad.abs().max() < 1e-7 < 1e-3 < blocks[1].experts.new.down_proj.grad.abs().max()


@pytest.fixture
def padded() -> Iterator[list[dict[str, torch.Tensor]]]:
    mask = torch.ones_like(IDS)
    mask[0, 10:] = mask[1, 25:] = 0
    yield [{"input_ids": IDS, "attention_mask": mask, "labels": IDS.where(mask.bool(), -100)}]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llava_mixtral"])
def test_usage_by_hand(folders: dict[str, Path], name: str, padded: list[dict[str, torch.Tensor]]) -> None:
    """From the router logits that transformers gives: a token's two largest, padding left out."""
    model, blocks = opened(folders[name])
    language = model.get_decoder()
    with torch.no_grad():
        out = language(**{key: padded[0][key] for key in ("input_ids", "attention_mask")}, output_router_logits=True)
    used = usage(model, blocks, padded * 2)  # twice the same changes no share
    real = padded[0]["attention_mask"].flatten().bool()
    for layer, logits in enumerate(out.router_logits):
        counts = [0] * 4
        for row in logits.reshape(-1, 4)[real].tolist():
            for expert in sorted(range(4), key=lambda e: -row[e])[:2]:
                counts[expert] += 1
        assert used[layer].tolist() == pytest.approx([n / sum(counts) for n in counts], abs=1e-12)


def test_the_shift_of_usage_by_hand() -> None:
    before, after = torch.tensor([0.5, 0.5, 0, 0]), torch.full((4,), 0.25)
    assert shift(before, after) == pytest.approx((4 * 0.25**2 / 3) ** 0.5)
    assert shift(after, after) == 0
    shifts = {0: 0.1, 3: 0.4, 5: 0.4, 7: 0.2, 9: 0.3}
    assert most_shifted(shifts, 0.5) == [3, 5] and most_shifted(shifts, 0.6) == [3, 5, 9]
    assert most_shifted(shifts, 0.01) == [3]
    used = torch.tensor([0.1, 0.4, 0.1, 0.4])
    assert most_used(used, 3) == [1, 3, 0] and least_used(used, 3) == [0, 2, 1] and most_used(used[:1], 3) == [0, 0, 0]


def test_shifts_are_measured_by_tuning_routers_alone_and_leave_no_trace(
    folders: dict[str, Path], padded: list[dict[str, torch.Tensor]]
) -> None:
    model, blocks = opened(folders["qwen3_vl_moe"])
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen: list[str] = []

    def moved(*_: Any) -> None:
        seen.extend(n for n, p in model.named_parameters() if n not in seen and not torch.equal(p, weights[n]))

    hook = model.get_decoder().register_forward_hook(moved)
    shifted = shifted_usage(model, blocks, padded, steps=40)
    hook.remove()
    assert sorted(seen) == [f"model.language_model.layers.{i}.mlp.gate.weight" for i in (0, 1)]
    assert all(torch.equal(p, weights[n]) and not p.requires_grad for n, p in model.named_parameters())
    assert not model.training and max(shift(*shares) for shares in shifted.values()) > 0
    before = usage(model, blocks, padded)
    assert all(torch.equal(before[layer], shifted[layer][0]) for layer in blocks)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("llava", "all", "LlavaForConditionalGeneration over LlamaModel is none of the models that MoExtend knows. It"),
        ("qwen3_vl", 0.5, r"layers: is a share, and a dense model has no routers .* Set it to all, or list"),
        ("qwen3_vl", [0, 2], "layers: the model has no layer 2 with MLP"),
        ("qwen3_vl_moe", [1, 5, 7], "layers: the model has no layer 5 with experts"),
    ],
)
def test_other_models_are_refused_in_a_line(folders: dict[str, Path], name: str, layers: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        blocks_of(load(folders[name]), layers)
    assert "\n" not in str(caught.value)


def test_a_dense_model_of_another_family_is_refused() -> None:
    with pytest.raises(InputError, match="Qwen2_5_VLForConditionalGeneration over Qwen2_5_VLTextModel is none"):
        blocks_of(tiny_model(), "all")


@pytest.mark.parametrize("layers", ["half", 0.0, 1.0, 1, [], [0.5], [-1], True])
def test_layers_that_mean_nothing_are_refused(layers: Any) -> None:
    with pytest.raises(InputError, match=r"method.moextend.layers: .*must be `all`, a share .* or a list"):
        build_methods({"moextend": {"layers": layers}}, TrainConfig())
    assert MoExtendConfig.model_validate({"layers": 0.5}).layers == 0.5


def test_it_trains_nothing_else() -> None:
    train = TrainConfig.model_validate({"modules": {"projector": "lora"}})
    with pytest.raises(InputError, match="moextend trains nothing but its own weights"):
        build_methods({"moextend": {}}, train)
    build_methods({"moextend": {"experts": 0}}, train)
    with pytest.raises(InputError, match=r"method\.reglora: does not work together with moextend"):
        build_methods({"reglora": {}, "moextend": {}}, TrainConfig())
    assert Added._fields == ("gate_up", "down", "rows")  # the names in a stage's state


@pytest.mark.parametrize("name", MIXTURES)
def test_what_an_expert_takes_is_known_from_shapes(folders: dict[str, Path], name: str) -> None:
    """What is checked against the disk before anything is trained, against the tensors themselves."""
    layers = [1] if name == "qwen3_vl" else "all"
    said = expert_bytes(load(folders[name]), layers)
    _, blocks = opened(folders[name])
    assert sum(said.values()) == sum(tensor.nbytes for block in blocks.values() for tensor in copies(block, [0])) > 0
