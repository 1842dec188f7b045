"""A merged copy: exact, rounded once, gone when nobody serves it, and left by a kill it is used again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import TINY, lora_policy
from transformers import AutoModelForImageTextToText

from mcit.data_prep.errors import InputError
from mcit.eval.engines import merging
from mcit.eval.engines.merging import merged_copy
from mcit.pipeline.policy.adapters import load_adapter


def test_each_weight_is_the_float32_sum_rounded_once_and_the_others_are_untouched(tmp_path: Path) -> None:
    policy = lora_policy(tmp_path / "stages", 1, "high", 8, dtype="bfloat16")
    with merged_copy(policy, tmp_path) as folder:
        merged = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    assert policy.adapter is not None
    adapter = load_adapter(policy.adapter)
    changed = 0
    for name, weight in merged.named_parameters():
        expected, module = base.get_parameter(name).detach(), name.removesuffix(".weight")
        if module in adapter:
            expected, changed = expected + adapter[module].delta(), changed + 1
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected.to(torch.bfloat16)), name
    assert changed == len(adapter) > 0


def test_two_evaluations_share_a_copy_and_the_last_one_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, made = lora_policy(tmp_path / "stages", 1, "high", 8), []
    monkeypatch.setattr(merging, "_merge", lambda policy, folder: made.append(folder))
    with merged_copy(policy, tmp_path) as first:
        with merged_copy(policy, tmp_path) as second:
            assert first == second and len(made) == 1
        assert first.is_dir()
    assert not first.exists()
    first.mkdir()  # as a killed evaluation leaves it
    with merged_copy(policy, tmp_path) as third:
        assert third == first and len(made) == 1
    assert not first.exists()


def test_a_copy_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = lora_policy(tmp_path / "stages", 1, "high", 8)

    def full(policy: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "_merge", full)
    with pytest.raises(OSError, match="No space left"), merged_copy(policy, tmp_path):
        raise AssertionError("served")
    assert [path.suffix for path in (tmp_path / "merged").iterdir()] == [".lock"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "problem"), [("layers.9.", "tensors do not fit"), ("layers.0.", "does not fit")])
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, key: str, problem: str) -> None:
    """Of other layers, and of other widths."""
    policy = lora_policy(tmp_path / "stages", 1, "foreign", 8)
    path = policy.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    if key == "layers.0.":
        save_file({name: torch.cat([t, t], dim=1 if "lora_A" in name else 0) for name, t in tensors.items()}, path)
    else:
        save_file({name.replace("layers.0.", key): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match=problem), merged_copy(policy, tmp_path):
        raise AssertionError("served")
