"""A base in 4 bits while it is trained on (QLoRA, arXiv 2305.14314): NF4, double quantization, by bitsandbytes.

Only the linear layers of the language model are quantised, since only they have LoRA beside them. Whatever is saved is
for the base as it is: policies are evaluated, served and merged on the base in its own dtype.
"""

import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any

from mcit.data_prep.errors import InputError

if TYPE_CHECKING:
    from ..recipe.schema import ModelConfig, Recipe

# Where it is installed PEFT imports it, and on a CPU it warns of a kernel that it would like to fetch from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check_quantization(recipe: "Recipe", lineages: set[str], carriers: set[str]) -> None:
    """Refuse what needs the base's weights as numbers. `carriers` are methods that carry the policy themselves.

    Raises `InputError`.
    """
    if recipe.base_model.quantization == "none":
        return
    field, remedy = "base_model.quantization", "Set it to none, or another train.lineage"
    for lineage, problem in (("fold", "folded into"), ("full", "trained whole")):
        if lineage in lineages:
            raise InputError(f"a quantised base cannot be {problem}", where=recipe.name, field=field, remedy=remedy)
    for method in carriers:
        problem = f"{method} trains weights of the base, which are quantised"
        raise InputError(problem, where=recipe.name, field=field, remedy="Set it to none, or drop the method")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("needs bitsandbytes", where=recipe.name, field=field, remedy="pip install bitsandbytes")


def quantised(base: "ModelConfig") -> dict[str, str]:
    """What identifies a quantised base beside its hash; nothing for one in its own dtype."""
    return {} if base.quantization == "none" else {"quantization": base.quantization}


def quantised_options(base: "ModelConfig") -> dict[str, Any]:
    """What `from_pretrained` takes to load the base as the recipe says; nothing for a base in its own dtype."""
    if base.quantization == "none":
        return {}
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    from ..recipe.schema import ModulesConfig
    from .lineage import target_names

    config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=base.trust_remote_code)
    language = set(target_names(model, ModulesConfig()))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        llm_int8_skip_modules=sorted(linear - language),  # what the setting is called, for 4 bits too
    )
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_trainable(model: Any) -> None:
    """On a CPU: keep bitsandbytes from packing weights in evaluation mode. They would stay packed, without a graph."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
