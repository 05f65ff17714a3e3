"""LlavaTrainer: TRL's SFTTrainer with a learning rate for each part of the model, and Muon where the recipe asks."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from trl import SFTTrainer

from processing_llava.collator import IGNORED_LABEL

from .muon import MuonWithAdamW
from .recipe import Recipe
from .run_log import RunLog, check_loss
from .token_budget import TokenBudgetBatchSampler


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: "mm_projector", "language_model", "vision_tower", ..."""
    return parameter_name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]


def freeze_all_but(model: nn.Module, trained_parts: tuple[str, ...]) -> None:
    """Let these parts train and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained_parts)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part, the number of its parameters and how many of them train."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        total, trained = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


def split_for_muon(model: nn.Module, groups: list[dict], *, rate: float) -> tuple[list[dict], list[dict]]:
    """Parameter groups for Muon, with its learning rate, and those that are left for AdamW.

    Muon takes matrices of the language model's layers and of the projector; embeddings are tables, not matrices.
    """
    chosen = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and (part_of(name) == "mm_projector" or "language_model.layers." in name)
    }
    matrices, others = [], []
    for group in groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        taken = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if kept:
            others.append(group | {"params": kept})
        if taken:
            matrices.append(group | {"params": taken, "lr": rate})
    return matrices, others


class LlavaTrainer(SFTTrainer):
    """SFTTrainer whose optimizer has one group for each part and kind of weight decay.

    Args:
        recipe: Gives the learning rates of projector and vision tower.
        batch_sampler: Says which rows are a batch, instead of `per_device_train_batch_size`.
        The others: those of SFTTrainer.
    """

    def __init__(self, *args, recipe: Recipe, batch_sampler: TokenBudgetBatchSampler | None = None, **kwargs) -> None:
        self.recipe = recipe
        self.batch_sampler = batch_sampler
        super().__init__(*args, **kwargs)
        self.run_log = RunLog(self.args.output_dir)
        self.add_callback(self.run_log)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self.batch_sampler or super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        self.run_log.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_loss(loss, step=self.state.global_step + 1)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The mean loss over supervised tokens.

        On a CPU, TRL computes logits of every position. Most of them are image features and questions, so that a third
        of a step on short answers went there; columns without a label are left out here.
        """
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        next_tokens = inputs["labels"][:, 1:]
        columns = (next_tokens != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**model_inputs, use_cache=False, logits_to_keep=columns)
        targets = next_tokens[:, columns]
        loss = nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        if num_items_in_batch is None:
            loss = loss / (targets != IGNORED_LABEL).sum()
        else:
            # The number is that of all processes, over which gradients are averaged.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            model = model or self.model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self.recipe.muon_learning_rate is None:
                self.optimizer = optimizer_class(self._parameter_groups(model), **settings)
            else:
                groups = self._parameter_groups(model)
                matrices, others = split_for_muon(model, groups, rate=self.recipe.muon_learning_rate)
                self.optimizer = MuonWithAdamW(matrices, others, **settings)
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
