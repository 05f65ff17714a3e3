"""LlavaTrainer: TRL's SFTTrainer with a learning rate for each part of the model."""

from torch import nn
from torch.optim import Optimizer
from trl import SFTTrainer

from .recipe import Recipe


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: "mm_projector", "language_model", "vision_tower", ..."""
    return parameter_name.removeprefix("model.").split(".")[0]


def freeze_all_but(model: nn.Module, trained_parts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Freeze the other parts, and count.

    Returns:
        For each part, the number of its parameters and how many of them train.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trained_parts)
        total, trained = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


class LlavaTrainer(SFTTrainer):
    """SFTTrainer whose optimizer has one group for each part and kind of weight decay.

    Args:
        recipe: Gives the learning rates of projector and vision tower.
        The others: those of SFTTrainer.
    """

    def __init__(self, *args, recipe: Recipe, **kwargs) -> None:
        self.recipe = recipe
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            model = model or self.model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self._parameter_groups(model), **settings)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict]:
        rates = {
            "mm_projector": self.recipe.projector_learning_rate,
            "image_newline": self.recipe.projector_learning_rate,
            "vision_tower": self.recipe.vision_tower_learning_rate,
        }
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(part_of(name))
                key = (
                    self.args.learning_rate if rate is None else rate,
                    self.args.weight_decay if name in decayed else 0.0,
                )
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
        ]
