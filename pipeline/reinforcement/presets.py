"""The settings of two papers as presets of `train.rft`; what a recipe sets itself stands.

docs/rft.md lists what differs from TRL's defaults.

"code" is yueluoshuangtian/MLLM-CTBench @17d034b for `ctbench`, and EasyR1, which the paper builds on, for `rft7`;
"second-hand" are notes on a paper whose configuration was not seen.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ctbench": {  # MLLM-CTBench, arXiv 2508.08275
        "rewards": {"accuracy": 1.0, "format": 1.0},  # code: summed with equal weights
        "args": {
            "num_generations": 4,  # G: code
            "num_iterations": 8,  # μ: code
            "epsilon": 0.15,  # code
            "beta": 0.04,  # code: the default of its trainer
            "learning_rate": 1e-5,  # code
            "num_train_epochs": 1,  # code
            "temperature": 1.0,  # code
            "max_completion_length": 256,  # code: the default, never overridden
            "loss_type": "grpo",  # code: the mean over each sequence
            "scale_rewards": "group",  # code
            "use_bias_correction_kl": False,  # code: k3 KL without a ratio
        },
    },
    "rft7": {  # RFT naturally mitigates forgetting, arXiv 2507.05386
        "rewards": {"accuracy": 0.9, "format": 0.1},  # second-hand
        "args": {
            "num_generations": 8,  # G: second-hand
            "num_iterations": 1,  # μ: code
            "generation_batch_size": 4096,  # second-hand: completions; 512 prompts × 8
            "epsilon": 0.2,  # code
            "epsilon_high": 0.3,  # code
            "beta": 0.01,  # second-hand
            "learning_rate": 1e-6,  # second-hand, on all weights
            "weight_decay": 0.01,  # code
            "num_train_epochs": 1,  # ours
            "temperature": 1.0,  # code
            "max_completion_length": 2048,  # code
            "loss_type": "bnpo",  # code: the mean over tokens
            "scale_rewards": "group",  # second-hand
            "use_bias_correction_kl": False,  # code: k3 KL without a ratio
        },
    },
}


def laid_under(section: Any) -> Any:
    """A raw `train.rft` with its preset's settings wherever it has none of its own. Doing it twice changes nothing."""
    preset = PRESETS.get(section.get("preset") or "") if isinstance(section, dict) else None
    if preset is None:
        return section
    args = section.get("args") or {}
    rewards = section.get("rewards")
    return {**section, "args": {**preset["args"], **args}, "rewards": rewards or dict(preset["rewards"])}
