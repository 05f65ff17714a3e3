"""A training run as a YAML file: what is trained from what, on which rows, and how.

Every field of TRL's SFTConfig stands here once, and a test holds that: what a newer TRL or transformers adds is
refused until somebody has decided whether it loses rows or sends something somewhere.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from trl import SFTConfig

from modeling_llava.records.yaml_fields import ACCESS_TOKEN, FieldsLoader, build, check_fields, read_yaml
from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_lengths import ON_BAD_ROW, check_length_options
from processing_llava.image_limits import ImageLimits
from processing_llava.original.original_folder import find_installed

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


STAGES = {
    "align": ("mm_projector", "image_newline"),
    "finetune": ("mm_projector", "image_newline", "language_model", "lm_head"),
    "lora": ("mm_projector", "image_newline"),
    "qlora": ("mm_projector", "image_newline"),
}
"""The parts of the model that each stage trains as a whole; the last two train adapters beside them."""
OUTPUT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides a run, apart from the machine. Paths start where the command is run.

    Raises:
        ValueError: if a field has a value that cannot work.
    """

    stage: str
    """"align" (projector only), "finetune" (projector and language model), "lora" (projector, and adapters in the
    language model) or "qlora" (the same on a 4-bit language model)."""
    model: str
    """Folder or Hub id of the model to start from."""
    data: list[DataSource]
    eval_data: list[DataSource] = field(default_factory=list)
    """Rows whose loss is measured after each epoch, or when `trainer.eval_strategy` says; none of them is trained on.
    As in every Trainer it is the mean of batches, so it depends a little on `per_device_eval_batch_size`."""
    data_manifest: str | None = None
    """YAML file that says where the data comes from, for the model card; see `export/data_manifest.py`."""
    output_dir: str
    """Where the trained model goes."""
    output_dtype: str = "float32"
    """Of the saved weights; training keeps them in float32."""
    template: str | None = None
    """Conversation format to train with and to store with the model. Default: the model's own."""
    learn_tokens: list[str] = field(default_factory=list)
    """Special tokens, added to the model's tokenizer before, that count as such in answers, to train with and to
    store. Other special tokens, and these in questions, are spelled in characters. Default: the model's own."""
    image_aspect_ratio: str | None = None
    """"pad", "square" or "anyres", to train with and to store. Default: the model's own."""
    image_backend: str | None = None
    """"torch" prepares pictures several times faster than "pil", and within two levels of it. Default: "pil", whose
    pixels are those of the original LLaVA. It is not stored with the model."""
    image_limits: ImageLimits = ImageLimits()
    """Above which a picture is refused before it is decoded: any field of `ImageLimits`."""
    max_length: int | None = None
    """Longest row in tokens, image features counted."""
    too_long: str = "drop"
    """What becomes of a longer row: "keep" it, "drop" it, or "split" it between turns. It is never cut."""
    bad_rows: str = "raise"
    """What becomes of a record that cannot be used: "raise" stops the run, "skip" goes on without it and logs it."""
    tokens_per_batch: int | None = None
    """Pack rows end to end, without padding, to batches of at most that many tokens on each device. None pads batches
    of `per_device_train_batch_size` rows."""
    images_per_batch: int | None = None
    """The largest number of images in a packed batch, so that the tower's work is balanced too."""
    attn_implementation: str | None = None
    """Of transformers; short rows train faster on CPU with "eager"."""
    compile_blocks: bool = False
    """Let torch compile the blocks of the language model: the first steps take longer, the others less time. Losses
    are equal up to rounding, but for dropout, which draws other random numbers."""
    train_vision_tower: bool = False
    feature_cache: str | None = None
    """Folder for what a frozen tower sees, so that it sees every picture once; see `feature_cache.py`."""
    projector_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    vision_tower_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    muon_learning_rate: float | None = None
    """Of projector and language model layers, whose matrices Muon then trains; for fresh language models."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Any field of PEFT's LoraConfig, for the stages "lora" and "qlora"; r=128, lora_alpha=256 by default. Not an
    `init_lora_weights` of "pissa_niter_N", which would load as another model."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any field of TRL's SFTConfig that changes something and sends nothing; see `trainer_fields.py`."""

    def __post_init__(self) -> None:
        _refuse_tokens(dataclasses.asdict(self), "recipe")
        if self.stage not in STAGES:
            raise ValueError(f"got stage={self.stage!r}; expected one of {', '.join(STAGES)}")
        if self.output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"got output_dtype={self.output_dtype!r}; expected one of {', '.join(OUTPUT_DTYPES)}")
        check_length_options(self.max_length, self.too_long)
        if self.bad_rows not in ON_BAD_ROW:
            raise ValueError(f"got bad_rows={self.bad_rows!r}; expected one of {', '.join(ON_BAD_ROW)}")
        if not self.data:
            raise ValueError("got no data; expected at least one {path: ..., image_folder: ...}")
        for source in self.eval_data:
            if source.streaming or source.weight is not None:
                raise ValueError(
                    f"got eval_data {source.path!r} that is streaming or has a weight; expected neither: each of its "
                    "rows is evaluated once"
                )
        if self.vision_tower_learning_rate is not None and not self.train_vision_tower:
            raise ValueError(
                "got vision_tower_learning_rate for a frozen tower; expected none: set train_vision_tower: true"
            )
        if self.images_per_batch is not None and self.tokens_per_batch is None:
            raise ValueError("got images_per_batch without tokens_per_batch; expected both, which packs batches")
        if self.tokens_per_batch is not None and self.attn_implementation is not None:
            raise ValueError(
                f"got attn_implementation={self.attn_implementation!r} with tokens_per_batch; expected none: packed "
                "rows have an attention of their own"
            )
        for name in ("tokens_per_batch", "images_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1; leave it out for padding")
        for name in ("projector_learning_rate", "vision_tower_learning_rate", "muon_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"got {name}={getattr(self, name)}; expected 0 or more")
        if self.feature_cache is not None and self.train_vision_tower:
            raise ValueError("got feature_cache for a tower that trains; expected a frozen one: take one of them out")
        if self.muon_learning_rate is not None and self.projector_learning_rate is not None:
            raise ValueError("got projector_learning_rate and muon_learning_rate; expected one of them")
        if self.muon_learning_rate is not None and self.stage == "align":
            raise ValueError(
                "got muon_learning_rate with stage 'align'; expected 'finetune', which trains a whole model"
            )
        if self.lora and not self.uses_lora:
            raise ValueError(f"got lora settings for stage {self.stage!r}; expected stage 'lora' or 'qlora'")
        if self.lora.get("init_lora_weights") == "eva":
            raise ValueError(
                "got lora.init_lora_weights='eva', which looks at data first; expected another: here it would "
                "begin with random numbers"
            )
        if str(self.lora.get("init_lora_weights")).startswith("pissa_niter_"):
            raise ValueError(
                f"got lora.init_lora_weights={self.lora['init_lora_weights']!r}, whose random start is not the same "
                "again when the adapter is loaded; expected 'pissa', which is exact"
            )
        if self.muon_learning_rate is not None and self.uses_lora:
            raise ValueError(f"got muon_learning_rate with stage {self.stage!r}; expected 'finetune'")
        if Path(self.output_dir).resolve() == Path(find_installed(self.model)).resolve():
            raise ValueError(
                f"got output_dir {self.output_dir!r}, where the model to train lies; expected another folder, since "
                "the model would be written over"
            )
        check_trainer(self.trainer, is_packed=self.tokens_per_batch is not None, num_eval_sources=len(self.eval_data))

    @property
    def uses_lora(self) -> bool:
        return self.stage in ("lora", "qlora")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return STAGES[self.stage] + (("vision_tower",) if self.train_vision_tower else ())


def _refuse_tokens(value: Any, key: str) -> None:
    """A run records its recipe, and prints it: a secret in it would go wherever the model goes."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_tokens(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _refuse_tokens(item, f"{key}.{number}")
    elif isinstance(value, str) and ACCESS_TOKEN.search(value):
        raise ValueError(f"got an access token in {key}; expected none, since a run records its recipe: take it out")


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        settings: `KEY=VALUE`, stronger than the file. The key is a path of names and of numbers of list items, such as
            `trainer.learning_rate` or `data.0.path`; the value is YAML. Without a value the key is taken out.

    Raises:
        ValueError: naming the file or the setting, if they make no recipe.
    """
    fields = read_yaml(Path(path))
    if not isinstance(fields, dict):
        raise ValueError(f"got {path}; expected a mapping with stage, model, output_dir, and data as a list")
    for setting in settings:
        apply_setting(fields, setting)
    for name in ("data", "eval_data"):
        if isinstance(fields.get(name), list):
            fields[name] = [build(DataSource, source, where=f"{name} of {path}") for source in fields[name]]
    if "image_limits" in fields:
        fields["image_limits"] = build(ImageLimits, fields["image_limits"], where=f"image_limits of {path}")
    trainer = fields.get("trainer", {})
    if isinstance(trainer, dict):
        # Before their types, whose messages hold values.
        refuse_sending(trainer)
    check_fields(trainer, SFTConfig, where=f"trainer of {path}")
    # Its type lacks the names with a number, such as pissa_niter_16, which Recipe refuses with a reason.
    check_fields(fields.get("lora", {}), LoraConfig, where=f"lora of {path}", untyped=("init_lora_weights",))
    return build(Recipe, fields, where=str(path))


def apply_setting(fields: dict[str, Any], setting: str) -> None:
    """Set, or take out, one key of a recipe that was read.

    Args:
        setting: `KEY=VALUE`; see `read_recipe`.

    Raises:
        ValueError: naming the setting, if it has no place.
    """
    key, equals, text = setting.partition("=")
    if not key or not equals:
        raise ValueError(f"got {setting!r}; expected KEY=VALUE, such as trainer.learning_rate=1e-4")
    *parents, last = key.split(".")
    place: Any = fields
    try:
        value = yaml.load(text, FieldsLoader)
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        name = int(last) if isinstance(place, list) else last
        if text:
            place[name] = value
        else:
            del place[name]
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"got {setting!r}; expected a key of the recipe and a value in YAML, such as trainer.learning_rate=1e-4 "
            "or data.0.path=rows.json; or nothing after = for a key that is there, to take it out"
        ) from error
