"""Published configurations: the adapter that we would save against the module tree that vLLM would build, on no memory.

Both models stand on torch's meta device, at full size. vLLM's own LoRA manager wraps its layers and takes the adapter;
`ignored_tensors`, which guards every evaluation, must find nothing that it would leave out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published
from random_model import PRETRAINED
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit.eval.engines.applied import ignored_tensors
from mcit.eval.lora import Factors
from mcit.pipeline.policy.adapters import lora_layers, save_adapter
from mcit.pipeline.policy.lineage import enter
from mcit.pipeline.recipe.schema import TrainConfig

pytest.importorskip("vllm")
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def save_first_stage(config: Any, folder: Path, **modules: str) -> list[str]:
    """The adapter that a first stage would save for a model of this configuration, all zeros; its layers' names."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        peft = enter(model, None, TrainConfig.model_validate({"lora": {"r": 1}, "modules": modules}))
    adapter = {
        name: Factors(torch.zeros(a.shape), torch.zeros(b.shape), scaling) for name, a, b, scaling in lora_layers(peft)
    }
    save_adapter(folder, adapter, "base")
    return list(adapter)


@pytest.fixture
def vllm_model(tmp_path: Path) -> Iterator[Any]:
    """Builds vLLM's model of a configuration, without memory, and lets its LoRA manager load an adapter's folder."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import create_lora_manager
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.model_loader.utils import initialize_model

    def build(config: Any, adapter: Path) -> Any:
        folder = tmp_path / "model"
        AutoProcessor.from_pretrained(PRETRAINED).save_pretrained(folder)
        config.save_pretrained(folder)
        settings = EngineArgs(str(folder), dtype="bfloat16", max_model_len=64, enable_lora=True, max_lora_rank=1)
        vllm = settings.create_engine_config()
        vocabulary, meta = config.get_text_config().vocab_size, torch.device("meta")
        with set_current_vllm_config(vllm):
            init_distributed_environment(1, 0, f"file://{tmp_path}/group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            with meta:
                model = initialize_model(vllm)
                manager = create_lora_manager(model, 1, 64, vocabulary, vllm.lora_config, vllm, meta)
        packed = manager.packed_modules_mapping
        lora = LoRAModel.from_local_checkpoint(
            str(adapter),
            {part for name in manager.supported_lora_modules for part in (packed.get(name) or [name])},
            PEFTHelper.from_local_dir(str(adapter), 64),
            lora_model_id=1,
            device="cpu",
            weights_mapper=model.hf_to_vllm_mapper.get_rename_mapper(),
        )
        manager.add_adapter(lora)
        return manager.model

    yield build
    cleanup_dist_env_and_memory()


def tensor_names(adapter: Path) -> list[str]:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", [name for name in published() if "A3B" not in name])
def test_vllm_applies_every_tensor_of_a_published_model(name: str, vllm_model: Any, tmp_path: Path) -> None:
    config = published()[name]
    layers = save_first_stage(config, tmp_path / "adapter")
    assert {layer.rpartition(".")[2] for layer in layers} == LANGUAGE
    tensors = tensor_names(tmp_path / "adapter")
    assert len(tensors) == 2 * 7 * config.get_text_config().num_hidden_layers
    model = vllm_model(config, tmp_path / "adapter")
    assert ignored_tensors(model, 1, tensors) == []
    strange = tensors[0].replace("down_proj", "unheard_proj")
    assert strange != tensors[0] and ignored_tensors(model, 1, [*tensors, strange]) == [strange]


def test_a_trained_vision_tower_would_be_ignored(vllm_model: Any, tmp_path: Path) -> None:
    config = published()["Qwen/Qwen2.5-VL-3B-Instruct"]
    save_first_stage(config, tmp_path / "adapter", vision="lora")
    tensors = tensor_names(tmp_path / "adapter")
    ignored = ignored_tensors(vllm_model(config, tmp_path / "adapter"), 1, tensors)
    assert ignored == [name for name in tensors if ".visual." in name] and len(ignored) == 2 * 32 * 5


def test_a_mixture_of_experts_trains_its_attention_and_vllm_has_no_lora_for_it_on_a_cpu(
    vllm_model: Any, tmp_path: Path
) -> None:
    config = published()["Qwen/Qwen3-VL-30B-A3B-Instruct"]
    layers = save_first_stage(config, tmp_path / "adapter")
    assert {layer.rpartition(".")[2] for layer in layers} == ATTENTION and len(layers) == 48 * 4
    with pytest.raises(RuntimeError, match="modular kernel not supported"):
        vllm_model(config, tmp_path / "adapter")
