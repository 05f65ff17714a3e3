"""Fields of TRL's SFTConfig that a recipe refuses, since others decide, or since rows would be lost."""

from typing import Any

NO_EFFECT = {
    "assistant_only_loss": "what the template marks as written by the assistant is learned, and nothing else",
    "completion_only_loss": "what the template marks as written by the assistant is learned, and nothing else",
    "dataset_kwargs": "rows are read as the recipe's data says",
    "dataset_num_proc": "rows are counted by all processors",
    "dataset_text_field": "rows are conversations",
    "eval_packing": "tokens_per_batch packs what is evaluated too",
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


def check_trainer(trainer: dict[str, Any], *, is_packed: bool, num_eval_sources: int) -> None:
    """Refuse what would change nothing, or would lose what a recipe promises.

    Args:
        trainer: Fields of SFTConfig.
        is_packed: The recipe packs rows.
        num_eval_sources: How many sources of rows it evaluates.

    Raises:
        ValueError: naming the field.
    """
    if "output_dir" in trainer:
        raise ValueError("got trainer.output_dir; expected output_dir at the top of the recipe")
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
    if trainer.get("load_best_model_at_end") and not num_eval_sources:
        raise ValueError("got trainer.load_best_model_at_end without rows that tell the best; expected eval_data")
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
