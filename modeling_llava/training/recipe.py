"""A training run as a YAML file: what is trained from what, on which rows, and how."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STAGES = {
    "align": ("mm_projector", "image_newline"),
    "finetune": ("mm_projector", "image_newline", "language_model", "lm_head"),
}
"""The parts of the model that each stage trains."""
OUTPUT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class DataSource:
    """One file of conversations."""

    path: str
    """JSON or JSON Lines."""
    image_folder: str = "."
    """Where the image paths of the rows start."""


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides a run, apart from the machine. Paths start where the command is run.

    Raises:
        ValueError: if a field has a value that cannot work.
    """

    stage: str
    """"align" (projector only) or "finetune" (projector and language model)."""
    model: str
    """Folder or Hub id of the model to start from."""
    data: list[DataSource]
    output_dir: str
    """Where the trained model goes."""
    output_dtype: str = "float32"
    """Of the saved weights; training keeps them in float32."""
    max_length: int | None = None
    """Longest row in tokens; a longer one is an error."""
    attn_implementation: str | None = None
    """Of transformers; short rows train faster on CPU with "eager"."""
    train_vision_tower: bool = False
    projector_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    vision_tower_learning_rate: float | None = None
    """Default: `learning_rate` of `trainer`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any field of TRL's SFTConfig."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"got stage={self.stage!r}; expected one of {', '.join(STAGES)}")
        if self.output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"got output_dtype={self.output_dtype!r}; expected one of {', '.join(OUTPUT_DTYPES)}")
        if not self.data:
            raise ValueError("got no data; expected at least one {path: ..., image_folder: ...}")
        if self.vision_tower_learning_rate is not None and not self.train_vision_tower:
            raise ValueError(
                "got vision_tower_learning_rate for a frozen tower; expected none: set train_vision_tower: true"
            )
        if "output_dir" in self.trainer:
            raise ValueError("got trainer.output_dir; expected output_dir at the top of the recipe")

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
