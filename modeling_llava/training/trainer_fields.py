"""What `trainer:` of a recipe takes of TRL's SFTConfig, and in which ranges.

What is surprising: most of these fields are checked by no one before they are used, and some of them only in the first
step, by torch.
"""

import difflib
import json
from pathlib import Path
from typing import Any

TRAINER_FIELDS = (
    # length and order
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    "train_sampling_strategy", "auto_find_batch_size", "average_tokens_across_devices",
    "ignore_data_skip", "restore_callback_states_from_checkpoint",
    # optimizer and loss
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "loss_type", "router_aux_loss_coef",
    # dtypes and memory
    "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "full_determinism", "use_cpu", "use_cache",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "use_liger_kernel", "liger_kernel_config",
    # evaluation and checkpoints
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "per_device_eval_batch_size", "prediction_loss_only", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "save_on_each_node", "enable_jit_checkpoint",
    # what is written of it
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics",
    "debug", "report_to",
    # several processes, and readers of data
    "accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed", "ddp_backend",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout",
    "dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
)  # fmt: skip
"""Fields of TRL's SFTConfig that `trainer:` takes. The others have no effect here, lose rows, or send something
somewhere; one that a newer TRL or transformers adds is refused until it stands here."""
INSTEAD = {
    "chat_template_path": "template at the top of the recipe",
    "eos_token": "template at the top of the recipe",
    "max_length": "max_length at the top of the recipe, which cuts no row",
    "output_dir": "output_dir at the top of the recipe",
    "packing": "tokens_per_batch at the top of the recipe",
    "push_to_hub": "`llava push` after the run",
    "resume_from_checkpoint": "`llava train --resume`",
}
"""What does the work of a field that `trainer:` does not take."""
DECIDED_BY_PACKING = (
    "data_seed", "dataloader_drop_last", "per_device_train_batch_size", "train_sampling_strategy",
)  # fmt: skip
"""Fields that have no effect beside `tokens_per_batch`."""
REPORTS = ("tensorboard", "codecarbon")
"""Loggers that `trainer.report_to` takes: they write files. The others send every setting, with the paths of this
machine, and some send checkpoints with pickles in them (transformers 5.23, integrations/integration_utils.py)."""
LEAST_ONE = (
    "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "eval_accumulation_steps", "save_total_limit", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout",
    "dataloader_prefetch_factor",
)  # fmt: skip
"""Of the other fields, numbers are at least 0, and `max_steps` is -1 where epochs count."""
LARGEST = {"seed": 2**32 - 1, "adam_beta1": 0.999999, "adam_beta2": 0.99999999, "label_smoothing_factor": 1}
"""Of the other fields, numbers are below 2**31."""
FREE_FIELDS = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "neftune_noise_alpha", "loss_type",
    "router_aux_loss_coef", "tf32", "full_determinism", "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_offloading", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
    "liger_kernel_config", "debug", "accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed",
    "ddp_backend", "dataloader_multiprocessing_context", "eval_strategy", "save_strategy", "logging_strategy",
)  # fmt: skip
"""Fields whose values other projects judge, when they use them: a mistake is any kind of error there."""


def check_trainer(trainer: dict[str, Any], *, num_eval_sources: int) -> None:
    """Refuse what `trainer:` does not take, and values that would change nothing or lose what a recipe promises.

    Args:
        num_eval_sources: How many sources of rows to evaluate the recipe has.

    Raises:
        ValueError: naming the field and what was expected.
    """
    refuse_trainer_fields(trainer)
    for name, value in trainer.items():
        _check_range(name, value)
    if trainer.get("num_train_epochs", 1) <= 0 and trainer.get("max_steps", -1) <= 0:
        raise ValueError(
            f"got trainer.num_train_epochs={trainer['num_train_epochs']} and no max_steps, which trains nothing; "
            "expected more than 0 of one of them"
        )
    if trainer.get("train_sampling_strategy") not in (None, "random", "sequential"):
        raise ValueError(
            f"got trainer.train_sampling_strategy={trainer['train_sampling_strategy']!r}, which takes rows "
            "for tokens; expected 'random' or 'sequential': tokens_per_batch makes batches without padding"
        )
    for name, needed in (("liger_kernel_config", "use_liger_kernel"), ("fsdp_config", "fsdp")):
        if trainer.get(name) and not trainer.get(needed):
            raise ValueError(f"got trainer.{name}, which has no effect here; expected {needed}, too: take it out")
    strategy = trainer.get("eval_strategy", "epoch" if num_eval_sources else "no")
    if (strategy != "no") != bool(num_eval_sources):
        raise ValueError(
            f"got trainer.eval_strategy={strategy!r} and {num_eval_sources} sources of eval_data; expected "
            "'epoch' or 'steps' with rows to evaluate, or neither"
        )
    _check_best(trainer, has_eval_data=bool(num_eval_sources))
    _check_senders(trainer)


def _check_range(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least = -1 if name == "max_steps" else int(name in LEAST_ONE)
    largest = LARGEST.get(name, 2**31 - 1)
    if not least <= value <= largest:
        raise ValueError(f"got trainer.{name}={value}; expected at least {least} and at most {largest}; correct it")


def refuse_trainer_fields(trainer: dict[str, Any]) -> None:
    """One sentence for every field that is not taken. Values, which may be secrets, are not told."""
    for name in trainer:
        if name not in TRAINER_FIELDS:
            similar = ", ".join(difflib.get_close_matches(str(name), TRAINER_FIELDS, n=5)) or "learning_rate"
            expected = INSTEAD.get(name, f"a field such as {similar}")
            raise ValueError(f"got trainer.{str(name)[:80]}, which no recipe takes; expected {expected}")


def _check_best(trainer: dict[str, Any], *, has_eval_data: bool) -> None:
    """What chooses the best checkpoint has to be measured."""
    by_loss = trainer.get("load_best_model_at_end"), trainer.get("save_strategy") == "best"
    for name, is_set in zip(("load_best_model_at_end", "save_strategy='best'"), by_loss):
        if is_set and not has_eval_data:
            raise ValueError(f"got trainer.{name} without rows that tell the best; expected eval_data")
    metric = trainer.get("metric_for_best_model")
    # TRL's log puts its accuracy into what an evaluation returns (TRL 1.16, trainer/sft_trainer.py).
    metrics = ("loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy")
    if metric is not None and (metric not in metrics or not has_eval_data):
        raise ValueError(
            f"got trainer.metric_for_best_model={metric!r} {'with' if has_eval_data else 'without'} eval_data; "
            f"expected one of {', '.join(metrics)}, all that is measured, with eval_data"
        )
    if trainer.get("greater_is_better") is not None and metric is None and not any(by_loss):
        raise ValueError(
            "got trainer.greater_is_better, which has no effect here; expected none, or load_best_model_at_end"
        )


def list_reports(trainer: dict[str, Any]) -> list[str]:
    """The loggers that `report_to` names; null means none, as "none" does."""
    names = trainer.get("report_to") or "none"
    return names if isinstance(names, list) else [names]


def _check_senders(trainer: dict[str, Any]) -> None:
    """Refuse loggers and trackers that send, as values of fields that are taken."""
    names = list_reports(trainer)
    for name in names:
        if name not in REPORTS and names != ["none"]:
            raise ValueError(
                f"got trainer.report_to={name!r}; expected none, or {' or '.join(REPORTS)}, which write files here: "
                "others send settings and paths of this machine, and progress.csv holds what they draw"
            )
    path = trainer.get("deepspeed")
    settings = path if isinstance(path, dict) else {}
    if isinstance(path, str) and Path(path).is_file():
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got trainer.deepspeed={path!r} ({error}); expected JSON; correct it") from error
    for name in ("wandb", "comet"):
        if name in settings:
            raise ValueError(f"got {name} in trainer.deepspeed, which sends while a run goes on; expected none")
