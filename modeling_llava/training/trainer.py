"""LlavaTrainer: TRL's SFTTrainer with a learning rate for each part of the model, and Muon where the recipe asks."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import ProgressCallback
from trl import SFTTrainer

from .muon import MuonWithAdamW
from .recipe import Recipe
from .resume_settings import SETTINGS_FILE, describe_settings
from .run_log import ProgressLine, RunLog, check_gradient, check_loss
from .sharding import check_divisible, prepare_sharding
from .supervised_loss import add_supervised_head
from .token_budget import TokenBudgetBatchSampler


def part_of(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: "mm_projector", "language_model", "vision_tower", ..."""
    return parameter_name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]


def freeze_all_but(model: nn.Module, trained_parts: tuple[str, ...]) -> None:
    """Let these parts train and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained_parts)


def count_numbers(parameter: nn.Parameter) -> int:
    """Numbers of a parameter; one that DeepSpeed ZeRO-3 has divided between processes only says how many it had."""
    return parameter.numel() or parameter.ds_numel


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part, the number of its parameters and how many of them train."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        # PEFT keeps the parameters that a part started from beside those that train.
        if "original_module" in name.split("."):
            continue
        part = part_of(name)
        total, trained = counts.get(part, (0, 0))
        number = count_numbers(parameter)
        counts[part] = (total + number, trained + number * parameter.requires_grad)
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


def keep_float32(model: nn.Module) -> None:
    """Train the parts beside the adapters of a 4-bit model in float32.

    TRL makes bfloat16 of all that trains there, as QLoRA's paper does with adapters. The steps of a projector that was
    trained before are smaller than what its bfloat16 weights can take up.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data = parameter.data.float()


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
        model = self.model.get_base_model() if recipe.uses_lora else self.model
        is_divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # A LoRA can reach the tower too.
        tower_trains = any(parameter.requires_grad for parameter in model.base_model.vision_tower.parameters())
        needs_tower = tower_trains or (is_divided and recipe.feature_cache is None)
        add_supervised_head(model, blank="picture" if needs_tower else "features")
        if is_divided:
            check_divisible(recipe, fsdp=self.is_fsdp_enabled)
        if self.is_fsdp_enabled:
            prepare_sharding(model, self.accelerator.state.fsdp_plugin)
        if recipe.stage == "qlora":
            keep_float32(self.model)
        if self.aux_loss_enabled:
            raise ValueError(
                f"got router_aux_loss_coef={self.router_aux_loss_coef} for a mixture of experts; expected 0, since "
                "this package trains without a loss on its router: set router_aux_loss_coef: 0 under trainer"
            )
        self.resume_settings = describe_settings(recipe, self.args, self.train_dataset)
        self.run_log = RunLog(self.args.output_dir)
        self.add_callback(self.run_log)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self.batch_sampler or super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        self.run_log.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_loss(loss, step=self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        """The Trainer asks for it between backward and the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In float16 some steps overflow, and their scaler leaves them out.
        if not self.args.fp16:
            check_gradient(grad_norm, step=self.state.global_step + 1)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.run_log.take_rates(self.state, num_processes=self.args.world_size)
        elif "eval_runtime" in logs:
            self.run_log.leave_out(logs["eval_runtime"])
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # FSDP gathers tied embeddings under both of their names.
        if state_dict is not None and self.model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            Path(output_dir, SETTINGS_FILE).write_text(json.dumps(self.resume_settings, indent=1) + "\n")
        super()._save_optimizer_and_scheduler(output_dir)

    def save_trained(self) -> None:
        """Write the trained model (of a LoRA: the adapter) and its processor to the output folder, in `output_dtype`.

        The curves are drawn after it, so that nothing in their way costs the model.

        Every process has to call it: each may hold a share of the weights.
        """
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        # DeepSpeed gives the others nothing.
        if not self.is_world_process_zero():
            return
        # Under torch_compile these are the names of a wrapper.
        state_dict = {name.removeprefix("_orig_mod."): value for name, value in state_dict.items()}
        model = self.accelerator.unwrap_model(self.model)
        dtype = getattr(torch, self.recipe.output_dtype)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, value in state_dict.items():
            # What is frozen under a LoRA is not written, and may be larger than the memory that is left.
            if value.is_floating_point() and not (self.recipe.uses_lora and name in frozen):
                state_dict[name] = value.to("cpu", dtype)
        if self.recipe.uses_lora:
            model.save_pretrained(self.args.output_dir, state_dict=state_dict)
        else:
            if model.config.tie_word_embeddings:
                # A copy of the input embeddings by then, which would be written beside them.
                state_dict.pop("lm_head.weight", None)
            model.save_pretrained(self.args.output_dir, state_dict=state_dict)
            model.config.dtype = dtype
            model.config.save_pretrained(self.args.output_dir)
        self.processing_class.save_pretrained(self.args.output_dir)
        self.run_log.draw()

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

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ValueError(
                f"got trainer.lr_scheduler_kwargs={self.args.lr_scheduler_kwargs} ({error}); expected those that "
                f"{self.args.lr_scheduler_type.value} takes"
            ) from error

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
