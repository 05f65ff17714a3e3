"""A training run as a YAML file: what is trained from what, on which rows, and how."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from processing_llava.data_sources import DataSource
from processing_llava.row_lengths import check_length_options

STAGES = {
    "align": ("mm_projector", "image_newline"),
    "finetune": ("mm_projector", "image_newline", "language_model", "lm_head"),
    "lora": ("mm_projector",),
    "qlora": ("mm_projector",),
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
    output_dir: str
    """Where the trained model goes."""
    output_dtype: str = "float32"
    """Of the saved weights; training keeps them in float32."""
    template: str | None = None
    """Conversation format to train with and to store with the model. Default: the model's own."""
    image_aspect_ratio: str | None = None
    """"pad", "square" or "anyres", to train with and to store. Default: the model's own."""
    max_length: int | None = None
    """Longest row in tokens, image features counted."""
    too_long: str = "drop"
    """What becomes of a longer row: "keep" it, "drop" it, or "split" it between turns. It is never cut."""
    tokens_per_batch: int | None = None
    """Pack rows end to end, without padding, to batches of at most that many tokens on each device. None pads batches
    of `per_device_train_batch_size` rows."""
    images_per_batch: int | None = None
    """The largest number of images in a packed batch, so that the tower's work is balanced too."""
    attn_implementation: str | None = None
    """Of transformers; short rows train faster on CPU with "eager"."""
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
    """Any field of PEFT's LoraConfig, for the stages "lora" and "qlora"; r=128, lora_alpha=256 by default."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any field of TRL's SFTConfig."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"got stage={self.stage!r}; expected one of {', '.join(STAGES)}")
        if self.output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"got output_dtype={self.output_dtype!r}; expected one of {', '.join(OUTPUT_DTYPES)}")
        check_length_options(self.max_length, self.too_long)
        if not self.data:
            raise ValueError("got no data; expected at least one {path: ..., image_folder: ...}")
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
        if self.tokens_per_batch is not None and "per_device_train_batch_size" in self.trainer:
            raise ValueError("got per_device_train_batch_size and tokens_per_batch; expected one of them")
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
        if self.muon_learning_rate is not None and self.uses_lora:
            raise ValueError(f"got muon_learning_rate with stage {self.stage!r}; expected 'finetune'")
        if "output_dir" in self.trainer:
            raise ValueError("got trainer.output_dir; expected output_dir at the top of the recipe")

    @property
    def uses_lora(self) -> bool:
        return self.stage in ("lora", "qlora")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        return STAGES[self.stage] + (("vision_tower",) if self.train_vision_tower else ())


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: naming the file, if it is not a recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"got recipe {str(path)!r}; expected a YAML file: there is none at this path")
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"got {path}, which is not YAML; expected a recipe: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("data", []), list):
        raise ValueError(f"got {path}; expected a mapping with stage, model, output_dir, and data as a list")
    check_fields(fields, Recipe, where=str(path))
    sources = []
    for source in fields["data"]:
        check_fields(source, DataSource, where=f"data of {path}")
        sources.append(DataSource(**source))
    return Recipe(**{**fields, "data": sources})


def check_fields(fields: dict[str, Any], kind: type, *, where: str) -> None:
    """Refuse unknown and missing fields of a dataclass.

    Raises:
        ValueError: naming `where`, the field, and the fields there are.
    """
    known = dataclasses.fields(kind)
    unknown = set(fields) - {item.name for item in known}
    if unknown:
        names = ", ".join(item.name for item in known)
        raise ValueError(f"got {', '.join(sorted(unknown))} in {where}; expected fields among {names}")
    required = [
        item.name
        for item in known
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"got {where} without {', '.join(missing)}; expected {', '.join(required)}")
