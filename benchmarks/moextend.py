"""What MoExtend takes at the size of published models, worked out on torch's meta device, where nothing has memory.

    python benchmarks/moextend.py

Builds each model in full, without weights, and adds experts to it as a stage does; the sizes are those of the
parameters that are there. Prints a table, and writes `benchmarks/moextend.json`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLMoeConfig

from mcit.data_prep.files import write_json
from mcit.pipeline.methods.moextend.experts import copies, count, extend
from mcit.pipeline.methods.moextend.models import blocks_of

# Published in the models' config.json.
COMMON = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32, "tie_word_embeddings": False}
MIXTURE = COMMON | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4}
MIXTURE |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
DENSE = COMMON | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8}
TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
MODELS = {
    "Qwen/Qwen3-VL-30B-A3B-Instruct": Qwen3VLMoeConfig(
        text_config=MIXTURE, vision_config=TOWER | {"out_hidden_size": 2048}, tie_word_embeddings=False
    ),
    "Qwen/Qwen3-VL-8B-Instruct": Qwen3VLConfig(
        text_config=DENSE, vision_config=TOWER | {"out_hidden_size": 4096}, tie_word_embeddings=False
    ),
}
# (new experts a layer, layers); None: as many as the mixture has, a copy of each.
CASES: dict[str, list[tuple[int | None, Any]]] = {
    "Qwen/Qwen3-VL-30B-A3B-Instruct": [(1, "all"), (4, "all"), (8, "all"), (8, 0.5), (None, "all")],
    "Qwen/Qwen3-VL-8B-Instruct": [(1, "all"), (1, list(range(1, 36, 4)))],
}
TRAINED = 4 + 4 + 8  # bytes a trained parameter: itself in float32, its gradient, and AdamW's two means
SERVED = 2  # bytes a parameter of the base, and of what a stage keeps: bfloat16
GIB = 2**30


def sizes(name: str, k: int | None, layers: Any) -> dict[str, Any]:
    """Parameters and GiB of one case."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(MODELS[name], dtype=torch.bfloat16)
        base = model.num_parameters()
        blocks = blocks_of(model, layers)
        chosen = list(blocks)[: int(layers * len(blocks))] if isinstance(layers, float) else list(blocks)
        for layer in chosen:
            experts = k or count(blocks[layer])
            extend(blocks[layer], copies(blocks[layer], [0] * experts))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    added = trained * len(blocks) // len(chosen)  # a layer that is not chosen gets copies that are not trained
    return {
        "model": name,
        "experts": experts,
        "layers": len(chosen),
        "base_parameters": base,
        "trained_parameters": trained,
        "training_gib": round(trained * TRAINED / GIB, 1),
        "weights_gib": round((base + added - trained) * SERVED / GIB, 1),
        "state_gib": round(trained * SERVED / GIB, 2),
        "merged_gib": round((base + added) * SERVED / GIB, 1),
    }


def rows() -> Iterator[dict[str, Any]]:
    for name, cases in CASES.items():
        for k, layers in cases:
            yield sizes(name, k, layers)


def main() -> None:
    print("GiB:")
    print("| model | new experts | layers | trained | frozen weights | trained, in all | kept a stage | merged |")
    print("|---|---|---|---|---|---|---|---|")
    table = list(rows())
    for row in table:
        print(
            f"| {row['model']} | {row['experts']} | {row['layers']} | {row['trained_parameters'] / 1e9:.2f} billion "
            f"| {row['weights_gib']} | {row['training_gib']} | {row['state_gib']} | {row['merged_gib']} |"
        )
    write_json(Path(__file__).with_suffix(".json"), {"rows": table})


if __name__ == "__main__":
    main()
