"""The fields of TRL's SFTConfig that a recipe takes, and those that it refuses with a reason.

Every field of SFTConfig stands here once, and a test holds that: what a newer TRL or transformers adds is refused
until somebody has decided whether it loses rows or sends something somewhere.
"""

import difflib
import json
from pathlib import Path
from typing import Any

TAKEN = (
    # length and order
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    "train_sampling_strategy", "length_column_name", "auto_find_batch_size", "average_tokens_across_devices",
    "ignore_data_skip", "restore_callback_states_from_checkpoint",
    # optimizer and loss
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "loss_type", "router_aux_loss_coef",
    # arithmetic and memory
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
_PUSH = "`llava push` sends a trained folder, privately and after its checks"
_TRACKER = "no tracker is told of a run; progress.csv and progress.png hold its curves"
SENDING = {
    "hub_always_push": _PUSH,
    "hub_model_id": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_revision": _PUSH,
    "hub_strategy": _PUSH,
    "hub_token": "`hf auth login` keeps a token where no record of a run holds it, and `llava push` uses it",
    "project": _TRACKER,
    "push_to_hub": _PUSH,
    "run_name": _TRACKER,
    "trackio_bucket_id": _TRACKER,
    "trackio_space_id": _TRACKER,
    "trackio_static_space_id": _TRACKER,
}
"""Fields of SFTConfig that send something somewhere while a run goes on, and what there is instead."""
REPORTS = ("tensorboard", "codecarbon")
"""Of `report_to`: those that write files. All others send every setting, with the paths of this machine, and some send
checkpoints, with pickles in them (transformers 5.23, integrations/integration_utils.py)."""
_DEEPSPEED_TRACKERS = ("wandb", "comet")
METRICS = ("loss", "eval_loss")
"""Of `metric_for_best_model`: all that an evaluation measures."""
NO_EFFECT = {
    "assistant_only_loss": "what the template marks as written by the assistant is learned, and nothing else",
    "batch_eval_metrics": "an evaluation measures the loss alone",
    "completion_only_loss": "what the template marks as written by the assistant is learned, and nothing else",
    "dataset_kwargs": "rows are read as the recipe's data says",
    "dataset_num_proc": "rows are counted by all processors",
    "dataset_text_field": "rows are conversations",
    "do_eval": "eval_data is evaluated when eval_strategy says",
    "do_predict": "a run trains; `llava ask` answers",
    "do_train": "a run trains",
    "eval_packing": "tokens_per_batch packs what is evaluated too",
    "include_for_metrics": "an evaluation measures the loss alone",
    "label_names": "labels are what the template marks",
    "local_rank": "torchrun and accelerate number the processes",
    "model_init_kwargs": "the model is loaded as stage and attn_implementation say",
    "packing": "tokens_per_batch packs, pictures too",
    "packing_strategy": "tokens_per_batch packs, pictures too",
    "pad_to_multiple_of": "batches are as long as their longest row",
    "pad_token": "it is that of the model's tokenizer",
    "padding_free": "tokens_per_batch packs, pictures too",
    "resume_from_checkpoint": "`llava train --resume` goes on with a run",
    "shuffle_dataset": "the sampler shuffles, unless train_sampling_strategy says otherwise",
    "truncation_mode": "no row is ever cut: see too_long",
    "trust_remote_code": "the models of this package need no code of a repository",
}
"""Fields of SFTConfig that would change nothing, and what decides instead."""
NO_EFFECT_PACKED = {
    "data_seed": "seed decides the order of the rows",
    "dataloader_drop_last": "every row is used once in each epoch",
    "length_column_name": "tokens_per_batch decides which rows are a batch",
    "per_device_train_batch_size": "tokens_per_batch decides which rows are a batch",
    "train_sampling_strategy": "tokens_per_batch decides which rows are a batch",
}
"""Those that change nothing in a recipe with tokens_per_batch."""
UNLESS_SET = ("chat_template_path", "eos_token", "max_length", "output_dir", "remove_unused_columns")
"""Fields of SFTConfig that `check_trainer` refuses where they would change something."""


def refuse_sending(trainer: dict[str, Any]) -> None:
    """Refuse what sends something somewhere. Values, which may be secrets, are not told.

    Raises:
        ValueError: naming the field.
    """
    for name in trainer:
        if name in SENDING:
            raise ValueError(f"got trainer.{name}, which sends while a run goes on; expected none: {SENDING[name]}")


def check_trainer(trainer: dict[str, Any], *, is_packed: bool, num_eval_sources: int) -> None:
    """Refuse what would change nothing, or would lose what a recipe promises.

    Args:
        trainer: Fields of SFTConfig.
        is_packed: The recipe packs rows.
        num_eval_sources: How many sources of rows it evaluates.

    Raises:
        ValueError: naming the field.
    """
    refuse_sending(trainer)
    if "output_dir" in trainer:
        raise ValueError("got trainer.output_dir; expected output_dir at the top of the recipe")
    for name in trainer:
        if name not in (*TAKEN, *UNLESS_SET, *NO_EFFECT):
            similar = ", ".join(difflib.get_close_matches(str(name), TAKEN, n=5)) or "learning_rate"
            raise ValueError(f"got trainer.{name}, which no recipe takes; expected a field such as {similar}")
    if trainer.get("max_length") is not None:
        raise ValueError("got trainer.max_length, which cuts; expected max_length at the top of the recipe")
    if trainer.get("remove_unused_columns"):
        raise ValueError(
            "got trainer.remove_unused_columns=True, which leaves no column to train on; expected false, or none"
        )
    if trainer.get("gradient_accumulation_steps", 1) < 1:
        raise ValueError(
            f"got trainer.gradient_accumulation_steps={trainer['gradient_accumulation_steps']}; expected at least 1"
        )
    strategy = trainer.get("eval_strategy", "epoch" if num_eval_sources else "no")
    if (strategy != "no") != bool(num_eval_sources):
        raise ValueError(
            f"got trainer.eval_strategy={strategy!r} and {num_eval_sources} sources of eval_data; expected "
            "'epoch' or 'steps' with rows to evaluate, or neither"
        )
    if trainer.get("train_sampling_strategy") not in (None, "random", "sequential"):
        raise ValueError(
            f"got trainer.train_sampling_strategy={trainer['train_sampling_strategy']!r}, which takes rows "
            "for tokens; expected 'random' or 'sequential': tokens_per_batch makes batches without padding"
        )
    if trainer.get("num_train_epochs", 1) <= 0 and trainer.get("max_steps", -1) <= 0:
        raise ValueError(
            f"got trainer.num_train_epochs={trainer['num_train_epochs']} and no max_steps, which trains nothing; "
            "expected more than 0 of one of them"
        )
    for name in ("chat_template_path", "eos_token"):
        if trainer.get(name) is not None:
            raise ValueError(
                f"got trainer.{name}, which changes rows after they were measured; expected template at the top "
                "of the recipe"
            )
    for name, reason in (NO_EFFECT | (NO_EFFECT_PACKED if is_packed else {})).items():
        if name in trainer:
            raise ValueError(f"got trainer.{name}, which has no effect here; expected none: {reason}")
    _check_best(trainer, has_eval_data=bool(num_eval_sources))
    _check_reports(trainer)


def _check_best(trainer: dict[str, Any], *, has_eval_data: bool) -> None:
    """What chooses the best checkpoint has to be measured."""
    if trainer.get("load_best_model_at_end") and not has_eval_data:
        raise ValueError("got trainer.load_best_model_at_end without rows that tell the best; expected eval_data")
    if trainer.get("save_strategy") == "best" and not has_eval_data:
        raise ValueError("got trainer.save_strategy='best' without rows that tell the best; expected eval_data")
    metric = trainer.get("metric_for_best_model")
    if metric is not None and (metric not in METRICS or not has_eval_data):
        raise ValueError(
            f"got trainer.metric_for_best_model={metric!r} {'with' if has_eval_data else 'without'} eval_data; "
            f"expected one of {', '.join(METRICS)}, all that is measured, with eval_data"
        )
    has_best = metric is not None or trainer.get("load_best_model_at_end") or trainer.get("save_strategy") == "best"
    if trainer.get("greater_is_better") is not None and not has_best:
        raise ValueError(
            "got trainer.greater_is_better, which has no effect here; expected none, or load_best_model_at_end"
        )


def _check_reports(trainer: dict[str, Any]) -> None:
    names = trainer.get("report_to", "none")
    names = names if isinstance(names, list) else [names]
    for name in names:
        if name not in REPORTS and names != ["none"]:
            raise ValueError(
                f"got trainer.report_to={name!r}; expected none, or {' or '.join(REPORTS)}, which write files here: "
                "others send settings and paths of this machine, and progress.csv holds what they draw"
            )
    path = trainer.get("deepspeed")
    settings = path if isinstance(path, dict) else {}
    if isinstance(path, str) and Path(path).is_file():
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in _DEEPSPEED_TRACKERS:
        if name in settings:
            raise ValueError(f"got {name} in trainer.deepspeed, which sends while a run goes on; expected none")
