"""What of an adapter vLLM applies."""

from collections.abc import Sequence
from typing import Any


def ignored_tensors(model: Any, number: int, names: Sequence[str]) -> list[str]:
    """Which tensors of the adapter loaded under `number` vLLM does not apply. Runs where vLLM's model is.

    vLLM loads a LoRA for any module name that ends like a linear layer's, then puts factors into the layers it has
    wrapped (`LoRAModelManager.modules`, of which q, k, v or gate, up share one: `packed_modules`) and drops the rest
    without a word. Vision towers and projectors are not wrapped.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager = model.lora_manager
    applied = {*manager.modules, *(part for parts in manager.packed_modules.values() for part in parts)}
    left_over = set(manager.get_adapter(number).loras) - set(manager.modules)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None

    def is_applied(name: str) -> bool:
        try:
            module, _ = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            return False
        return module in applied and module not in left_over

    return [name for name in names if not is_applied(name)]
