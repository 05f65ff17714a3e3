"""A training run as a YAML file: what is trained from what, on which rows, and how.

    Recipe       the fields, and what each of them means; those of `trainer:` are in `trainer_fields.py`
    read_recipe  the file, with settings of the command line on top

A mistake that shows in the recipe alone is refused here, before anything is loaded. What needs more is refused where
that is known: the launcher in `trainer.check_sharding`, the machine in `run.build_trainer`, the model in
`starting_model.py`, the checkpoint in `checkpoints.check_settings`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from trl import SFTConfig

from modeling_llava.records.yaml_fields import ACCESS_TOKEN, build, check_fields, load_yaml, read_yaml
from processing_llava.data.data_sources import PICTURE_LIMITS, DataSource
from processing_llava.data.row_lengths import ON_BAD_ROW, check_length_options
from processing_llava.image_limits import ImageLimits
from processing_llava.messages import shorten
from processing_llava.original.original_folder import find_installed

from .trainer_fields import DECIDED_BY_PACKING, check_trainer, refuse_trainer_fields

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
    """Folder or Hub id of the model to start from, or "embedded"."""
    data: list[DataSource]
    eval_data: list[DataSource] = field(default_factory=list)
    """Rows whose loss is measured after each epoch, or when `trainer.eval_strategy` says. A line tells how many of
    them are trained on, too. As in every Trainer the loss is the mean of batches, so it depends a little on
    `per_device_eval_batch_size`."""
    data_manifest: str | None = None
    """YAML file that says where the data comes from, for the model card; see `records/training_record.py`."""
    output_dir: str
    """Where the trained model goes."""
    output_dtype: str = "float32"
    """Dtype of the saved weights; training keeps them in float32."""
    template: str | None = None
    """Conversation format to train with and to store with the model. Default: the model's own."""
    learn_tokens: list[str] = field(default_factory=list)
    """Special tokens, added to the model's tokenizer before, that count as such in answers, to train with and to
    store. Other special tokens, and these in questions, are spelled in characters. Default: the model's own."""
    image_aspect_ratio: str | None = None
    """"pad", "square" or "anyres", to train with and to store. Default: the model's own."""
    image_backend: str | None = None
    """"torch" prepares pictures faster than "pil" (BENCHMARKS.md, Preprocessing), and within two levels of it.
    Default: "pil", whose pixels are those of the original LLaVA. It is not stored with the model."""
    image_limits: ImageLimits = PICTURE_LIMITS
    """Costs above which a picture is refused before it is decoded: any field of `ImageLimits`."""
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
    """Attention of transformers: "sdpa", "eager", ... Default: what transformers chooses."""
    compile_blocks: bool = False
    """Let torch compile the blocks of the language model, which makes the first steps longer. Losses are equal up to
    rounding; dropout samples other random numbers."""
    train_vision_tower: bool = False
    feature_cache: str | None = None
    """Folder for what a frozen tower sees, so that it sees every picture once; see `feature_cache.py`."""
    projector_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    vision_tower_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Any field of PEFT's LoraConfig, for the stages "lora" and "qlora"; r=128, lora_alpha=256 by default. Not an
    `init_lora_weights` of "pissa_niter_N", which would load as another model."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of TRL's SFTConfig: those of `TRAINER_FIELDS`."""

    def __post_init__(self) -> None:
        _refuse_tokens(dataclasses.asdict(self), "recipe")
        _check_choices(self)
        _check_data(self)
        _check_packing(self)
        _check_rates(self)
        _check_lora(self)
        check_trainer(self.trainer, num_eval_sources=len(self.eval_data))

    @property
    def uses_lora(self) -> bool:
        return self.stage in ("lora", "qlora")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return STAGES[self.stage] + (("vision_tower",) if self.train_vision_tower else ())


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
        _apply_setting(fields, setting)
    for name in ("data", "eval_data"):
        if isinstance(fields.get(name), list):
            fields[name] = [build(DataSource, source, where=f"{name} of {path}") for source in fields[name]]
    if "image_limits" in fields:
        limits = fields["image_limits"]
        limits = dataclasses.asdict(PICTURE_LIMITS) | limits if isinstance(limits, dict) else limits
        fields["image_limits"] = build(ImageLimits, limits, where=f"image_limits of {path}")
    trainer = fields.get("trainer", {})
    if isinstance(trainer, dict):
        # Before their types, whose messages hold values: a token that is to send something would be printed.
        refuse_trainer_fields(trainer)
    check_fields(trainer, SFTConfig, where=f"trainer of {path}")
    # Its type lacks the names with a number, such as pissa_niter_16, which Recipe refuses with a reason.
    check_fields(fields.get("lora", {}), LoraConfig, where=f"lora of {path}", untyped=("init_lora_weights",))
    return build(Recipe, fields, where=str(path))


def _apply_setting(fields: dict[str, Any], setting: str) -> None:
    """Set, or take out, one key of a recipe that was read; see `read_recipe`."""
    key, equals, text = setting.partition("=")
    if not key or not equals:
        raise ValueError(f"got {shorten(setting)}; expected KEY=VALUE, such as trainer.learning_rate=1e-4")
    *parents, last = key.split(".")
    place: Any = fields
    try:
        value = load_yaml(text)
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        name = int(last) if isinstance(place, list) else last
        if text:
            place[name] = value
        else:
            del place[name]
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
        yaml.YAMLError,
    ) as error:
        raise ValueError(
            f"got {shorten(setting)}; expected a key of the recipe and a value in YAML, such as "
            "trainer.learning_rate=1e-4 or data.0.path=rows.json; or nothing after = for a key that is there, to take "
            "it out"
        ) from error


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


def _check_choices(recipe: Recipe) -> None:
    for name, choices in (("stage", STAGES), ("output_dtype", OUTPUT_DTYPES), ("bad_rows", ON_BAD_ROW)):
        value = getattr(recipe, name)
        if value not in choices:
            raise ValueError(f"got {name}={shorten(value)}; expected one of {', '.join(choices)}")
    check_length_options(recipe.max_length, recipe.too_long)
    if Path(recipe.output_dir).resolve() == Path(find_installed(recipe.model)).resolve():
        raise ValueError(
            f"got output_dir {recipe.output_dir!r}, where the model to train lies; expected another folder, since "
            "the model would be written over"
        )
    if recipe.feature_cache is not None and recipe.train_vision_tower:
        raise ValueError("got feature_cache for a tower that trains; expected a frozen one: take one of them out")


def _check_data(recipe: Recipe) -> None:
    if not recipe.data:
        raise ValueError("got no data; expected at least one {path: ..., image_folder: ...}")
    for source in recipe.eval_data:
        if source.streaming or source.weight is not None:
            raise ValueError(
                f"got eval_data {source.path!r} that is streaming or has a weight; expected neither: each of its "
                "rows is evaluated once"
            )
    if not any(source.streaming for source in recipe.data):
        return
    if recipe.tokens_per_batch is not None:
        raise ValueError("got tokens_per_batch for data that is streaming; expected data on disk, or padded batches")
    if recipe.trainer.get("max_steps", -1) <= 0:
        raise ValueError(
            "got streaming data, whose rows are not counted; expected a number of steps: set max_steps under trainer"
        )


def _check_packing(recipe: Recipe) -> None:
    for name in ("tokens_per_batch", "images_per_batch"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise ValueError(f"got {name}={value}; expected at least 1; leave it out for padding")
    if recipe.tokens_per_batch is None:
        if recipe.images_per_batch is not None:
            raise ValueError("got images_per_batch without tokens_per_batch; expected both, which packs batches")
        return
    if recipe.attn_implementation is not None:
        raise ValueError(
            f"got attn_implementation={recipe.attn_implementation!r} with tokens_per_batch; expected none: packed "
            "rows have an attention of their own"
        )
    for name in DECIDED_BY_PACKING:
        if name in recipe.trainer:
            raise ValueError(
                f"got trainer.{name}, which has no effect beside tokens_per_batch; expected one of them: "
                "tokens_per_batch decides which rows are a batch, and in which order"
            )


def _check_rates(recipe: Recipe) -> None:
    for name in ("projector_learning_rate", "vision_tower_learning_rate"):
        rate = getattr(recipe, name)
        if rate is not None and rate < 0:
            raise ValueError(f"got {name}={rate}; expected 0 or more")
    if recipe.vision_tower_learning_rate is not None and not recipe.train_vision_tower:
        raise ValueError(
            "got vision_tower_learning_rate for a frozen tower; expected none: set train_vision_tower: true"
        )


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora and not recipe.uses_lora:
        raise ValueError(f"got lora settings for stage {recipe.stage!r}; expected stage 'lora' or 'qlora'")
    start = recipe.lora.get("init_lora_weights")
    if start == "eva":
        raise ValueError(
            "got lora.init_lora_weights='eva', which looks at data first; expected another: here it would "
            "begin with random numbers"
        )
    if str(start).startswith("pissa_niter_"):
        raise ValueError(
            f"got lora.init_lora_weights={start!r}, whose random start is not the same again when the adapter is "
            "loaded; expected 'pissa', which is exact"
        )
