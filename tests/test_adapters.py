"""Factor arithmetic against dense matrices, and folders that PEFT loads on the untouched base."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training import TINY, random_adapter, tiny_model

from mcit.data_prep.errors import InputError
from mcit.eval.lora import Factors, hash_adapter, load_adapter
from mcit.pipeline.policy.adapters import concat, live_adapter, negate, pattern, rank, save_adapter

Q, DOWN = "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.3.mlp.down_proj"


def factors(r: int, rows: int, columns: int, scaling: float, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator), scaling)


def test_concat_is_the_sum_of_the_dense_changes() -> None:
    first = {"x": factors(2, 5, 4, 0.5, 1), "y": factors(2, 3, 4, 0.5, 2)}
    second = {"x": factors(3, 5, 4, 2.0, 3)}
    total = concat([first, second])
    assert rank(total) == 5
    assert {f.a.shape[0] for f in total.values()} == {5} and {f.scaling for f in total.values()} == {1.0}
    x = 0.5 * first["x"].b @ first["x"].a + 2 * second["x"].b @ second["x"].a
    torch.testing.assert_close(total["x"].delta(), x)
    torch.testing.assert_close(total["y"].delta(), 0.5 * first["y"].b @ first["y"].a)  # absent from `second`: zero
    undone = concat([total, negate(total)])
    torch.testing.assert_close(undone["x"].delta(), torch.zeros(5, 4))


def test_pattern_matches_exactly_the_names() -> None:
    names = [
        "model.language_model.layers.0.mlp.up",
        "model.language_model.layers.10.mlp.up",
        "visual.merger.mlp.0",
        "head",
    ]
    others = [
        "model.language_model.layers.1.mlp.up",
        "model.visual.layers.0.mlp.up",
        "model.language_model.layers.0.mlp.upper",
        "visual.merger.mlp.2",
        "modelXlanguage_model.layers.0.mlp.up",
        "my.head",
    ]
    regex = pattern(names)
    assert [name for name in names + others if re.fullmatch(regex, name)] == names
    assert pattern(reversed(names)) == regex


def test_a_saved_adapter_is_what_peft_loads(tmp_path) -> None:
    adapter = concat([random_adapter(tiny_model(), [Q, DOWN], 3, seed=5, scaling=0.7)])
    save_adapter(tmp_path / "adapter", adapter, str(TINY))
    base, ids = tiny_model(), torch.tensor([[10, 20, 30, 40]])
    dense = tiny_model()
    with torch.no_grad():
        for name, f in adapter.items():
            dense.get_submodule(name).weight += f.delta()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert set(live_adapter(loaded)) == {Q, DOWN}  # and no vision layer with such a leaf name
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0, atol=2e-5)
    again = load_adapter(tmp_path / "adapter")
    assert all(torch.equal(again[n].a, adapter[n].a) and torch.equal(again[n].b, adapter[n].b) for n in adapter)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, str(TINY))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 3.0)])
def test_scaling_of_an_adapter_that_peft_saved(tmp_path, rslora: bool, scaling: float) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=pattern([Q, DOWN]), use_rslora=rslora, alpha_pattern={"down_proj": 10}
    )
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter[Q].scaling == pytest.approx(scaling)
    assert adapter[DOWN].scaling == pytest.approx(10 / 6 * scaling)


def test_hash_follows_what_the_adapter_adds(tmp_path) -> None:
    adapter = random_adapter(tiny_model(), [Q], 2, seed=1)
    save_adapter(tmp_path / "a", adapter, "here")
    save_adapter(tmp_path / "b", adapter, "elsewhere")
    save_adapter(tmp_path / "c", {Q: adapter[Q]._replace(scaling=2.0)}, "here")
    save_adapter(tmp_path / "d", random_adapter(tiny_model(), [Q], 2, seed=2), "here")
    hashes = [hash_adapter(tmp_path / name) for name in "abcd"]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_foreign_folders_are_refused_in_one_line(tmp_path) -> None:
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=pattern([Q]), use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"adapter_config.json: use_dora: is not a plain LoRA adapter"):
        load_adapter(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="concat"):
        save_adapter(tmp_path / "x", {"x": factors(2, 5, 4, 1, 1), "y": factors(3, 5, 4, 1, 1)}, "base")
