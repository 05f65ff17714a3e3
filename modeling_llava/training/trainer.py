"""LlavaTrainer: TRL's SFTTrainer with a learning rate for each part of the model, and what sharding takes."""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from .packed_batches import TokenBudgetBatchSampler
from .recipe import Recipe
from .run_folder import FILES_FILE, SETTINGS_FILE, describe_settings, seal_checkpoint
from .run_log import ProgressLine, RunLog
from .starting_model import keep_float32, part_of
from .supervised_loss import add_supervised_head


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
        # A LoRA can reach the tower too. Processes with shards of the tower must all run it, or none.
        tower_trains = any(parameter.requires_grad for parameter in model.base_model.vision_tower.parameters())
        has_shards = (self.is_fsdp_enabled or self.is_deepspeed_enabled) and recipe.feature_cache is None
        add_supervised_head(model, dummy="image" if tower_trains or has_shards else "features")
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            check_sharding(plugin, stage=recipe.stage)
            prepare_sharding(model, plugin)
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

    # One step: its batch, its loss, its gradient, and the optimizer.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self.batch_sampler or super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        self.run_log.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_finite("a loss", loss.item(), step=self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        """The Trainer asks for it between backward and the optimizer's step (transformers 5.23, trainer.py)."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In float16 some steps overflow, and their scaler leaves them out.
        if not self.args.fp16:
            check_finite("a gradient with a norm", float(grad_norm), step=self.state.global_step + 1)
        return grad_norm

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            model = model or self.model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            plain = copy.copy(self.args)
            plain.optim_args = None
            if self.args.optim_args and self.get_optimizer_cls_and_kwargs(plain, model)[1] == settings:
                raise ValueError(
                    f"got trainer.optim_args={self.args.optim_args!r}, which has no effect on {plain.optim}; expected "
                    "arguments that it takes, or none: take it out"
                )
            self.optimizer = optimizer_class(self.group_parameters(model), **settings)
        return self.optimizer

    def group_parameters(self, model: nn.Module) -> list[dict]:
        """The parameters that train, a group for each learning rate and weight decay."""
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

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ValueError(
                f"got trainer.lr_scheduler_kwargs={self.args.lr_scheduler_kwargs} ({error}); expected those that "
                f"{self.args.lr_scheduler_type.value} takes"
            ) from error

    # What is written: logs, checkpoints, and the trained model.

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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and seal it, and then let it take the place of older ones."""
        path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (path / FILES_FILE).unlink(missing_ok=True)
        # The Trainer would remove older ones before this one is sealed (transformers 5.23, trainer.py).
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        # Each process writes files of its own.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(path)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            Path(output_dir, SETTINGS_FILE).write_text(json.dumps(self.resume_settings, indent=1) + "\n")
        super()._save_optimizer_and_scheduler(output_dir)

    def save_trained(self) -> None:
        """Write the trained model (of a LoRA: the adapter) and its processor to the output folder, in `output_dtype`.

        The curves are drawn after it, so that nothing in their way costs the model.

        Every process has to call it: each may hold a shard of the weights.
        """
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        # Under DeepSpeed the other processes get None.
        if not self.is_world_process_zero():
            return
        # torch.compile wraps a module and puts this before the names of its parameters.
        state_dict = {name.removeprefix("_orig_mod."): value for name, value in state_dict.items()}
        model = self.accelerator.unwrap_model(self.model)
        dtype = getattr(torch, self.recipe.output_dtype)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, value in state_dict.items():
            # What is frozen under a LoRA is not written, and may be larger than the memory that is left.
            if value.is_floating_point() and not (self.recipe.uses_lora and name in frozen):
                state_dict[name] = value.to("cpu", dtype)
        if not self.recipe.uses_lora and model.config.tie_word_embeddings:
            # A copy of the input embeddings by then, which would be written beside them.
            state_dict.pop("lm_head.weight", None)
        model.save_pretrained(self.args.output_dir, state_dict=state_dict)
        if not self.recipe.uses_lora:
            model.config.dtype = dtype
            model.config.save_pretrained(self.args.output_dir)
        self.processing_class.save_pretrained(self.args.output_dir)
        self.run_log.plot(self.state)


def check_finite(what: str, value: float, *, step: int) -> None:
    """Stop a run on a loss or gradient that is not finite, before it is trained into the weights.

    A gradient can be so under a finite loss.

    Raises:
        ValueError: naming the step.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"got {what} of {value} at step {step}; expected a number: lower the learning rate, or look for a broken "
            "row with `llava check-data`; the last checkpoint is unharmed"
        )


# What sharding takes: FSDP and DeepSpeed give each process a shard of the model.


def is_sharded(arguments: SFTConfig) -> bool:
    """Whether FSDP or DeepSpeed shard the model; `accelerate launch` says so in an environment variable."""
    has_fsdp = arguments.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return has_fsdp or arguments.deepspeed_plugin is not None


def check_sharding(plugin: FullyShardedDataParallelPlugin, *, stage: str) -> None:
    """Refuse what FSDP cannot do with a run.

    Args:
        plugin: The settings of `accelerate launch`.
        stage: As in the recipe.

    Raises:
        ValueError: naming the setting under which weights would be lost or checkpoints could not be loaded.
    """
    if stage == "qlora":
        raise ValueError(
            "got stage 'qlora' for FSDP; expected a whole model in each process, since a checkpoint of 4-bit weights "
            "that FSDP has sharded cannot be resumed: launch with torchrun alone"
        )
    if plugin.fsdp_version != 2:
        raise ValueError("got fsdp_version: 1; expected 2, which shards frozen and trained weights side by side")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"got fsdp_state_dict_type: {plugin.state_dict_type.name}; expected FULL_STATE_DICT, whose checkpoints "
            "from_pretrained loads in one process"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "got fsdp_cpu_ram_efficient_loading: true; expected false: only the first process would have weights "
            "before the model is sharded, and the vision tower may encode images by then"
        )


def prepare_sharding(model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin) -> None:
    """Adapt a LLaVA, and the settings of `accelerate launch`, to each other before the model is sharded."""
    # accelerate shards layers of these classes (1.15, utils/dataclasses.py), and the towers of transformers name some
    # of their text half too (transformers 5.23, models/clip/modeling_clip.py).
    model._no_split_modules &= {type(module).__name__ for module in model.modules()}
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # accelerate's own sums gradients, and returns the loss, in 16 bits (1.15, utils/dataclasses.py).
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )
