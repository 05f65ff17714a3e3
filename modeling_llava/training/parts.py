"""The parts of a model that trains: whose a parameter is, which of them train, and how many parameters they have."""

from torch import nn


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: "mm_projector", "language_model", "vision_tower", ..."""
    return parameter_name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]


def freeze_all_but(model: nn.Module, trained_parts: tuple[str, ...]) -> None:
    """Let these parts train and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained_parts)


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; one that ZeRO-3 has sharded is empty, and says how many it had (PEFT 0.21,
    peft_model.py)."""
    return parameter.numel() or parameter.ds_numel


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part, its parameters and how many of them train."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        # PEFT keeps the parameters that a part started from beside those that train (PEFT 0.21, utils/other.py).
        if "original_module" in name.split("."):
            continue
        part = part_of(name)
        total, trained = counts.get(part, (0, 0))
        number = count_elements(parameter)
        counts[part] = (total + number, trained + number * parameter.requires_grad)
    return counts


def keep_float32(model: nn.Module) -> None:
    """Train the parts beside the adapters of a 4-bit model in float32.

    TRL casts all that trains there to bfloat16, as QLoRA's paper does with adapters (TRL 1.16,
    trainer/sft_trainer.py). The steps of a projector that was trained before are smaller than what its bfloat16
    weights can take up.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data = parameter.data.float()
