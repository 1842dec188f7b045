"""A merged copy: exact, rounded once, gone when nobody serves it, and left by a kill it is used again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import TINY, lora_policy
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit.data_prep.errors import InputError
from mcit.eval.engines import merging
from mcit.eval.engines.merging import merged_copy
from mcit.eval.lora import load_adapter
from mcit.eval.serving import save_processor


def test_a_merge_is_the_base_as_it_is_served_and_the_lora_rounded_once(tmp_path: Path) -> None:
    """The base is stored in float32 and served in bfloat16: trainer and engines add the LoRA to the rounded weights.

    For each weight this is as near to what they compute as bfloat16 has numbers. Every other tensor is the base's.
    """
    policy = lora_policy(tmp_path / "stages", 1, "high", 8, dtype="bfloat16")
    with merged_copy(policy, tmp_path) as folder:
        merged = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    assert policy.adapter is not None
    adapter = load_adapter(policy.adapter)
    changed = other = 0
    for name, weight in merged.named_parameters():
        stored, module = base.get_parameter(name).detach(), name.removesuffix(".weight")
        expected = stored.to(torch.bfloat16)
        if module in adapter:
            a, b, scaling = adapter[module]
            expected = (expected.double() + scaling * b.double() @ a.double()).float().to(torch.bfloat16)
            other += int((weight != (stored + adapter[module].delta()).to(torch.bfloat16)).sum())
            changed += 1
            assert (weight != expected).float().mean() < 1e-3, name  # where float32 and float64 round apart
        else:
            assert torch.equal(weight, expected), name
        assert weight.dtype == torch.bfloat16
    assert changed == len(adapter) > 0
    assert other > 0  # the base as it is stored would give other weights


def test_two_evaluations_share_a_copy_and_the_last_one_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, made = lora_policy(tmp_path / "stages", 1, "high", 8), []
    monkeypatch.setattr(merging, "write_merged", lambda serving, changes, folder: made.append(folder))
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

    def full(serving: object, changes: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "write_merged", full)
    with pytest.raises(OSError, match="No space left"), merged_copy(policy, tmp_path):
        raise AssertionError("served")
    assert [path.suffix for path in (tmp_path / "merged").iterdir()] == [".lock"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("key", "problem"), [("layers.9.", "no such linear layer"), ("layers.0.", "and the layer")])
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


def test_a_policy_is_the_same_whether_the_hub_could_be_reached(tmp_path: Path) -> None:
    """transformers writes down whether it looked there."""
    for name, offline in (("on", False), ("off", True)):
        processor = AutoProcessor.from_pretrained(TINY, local_files_only=offline)
        save_processor(processor, tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("on", "off")]
    assert files[0] == files[1] and "tokenizer_config.json" in files[0]
