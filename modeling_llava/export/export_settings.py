"""What is decided about an export, and what comes out of it.

It stands apart from `repository.py` because the files of all kinds, which that one imports, need both classes.
"""

from dataclasses import dataclass, field
from pathlib import Path

from modeling_llava.records.training_record import DataEntry

from .card_facts import CardFacts


@dataclass(kw_only=True)
class ExportSettings:
    """What a person decides about an export."""

    repo_id: str | None = None
    """For the card. Default: the name of the folder that is written."""
    layout: str | None = None
    """"any_llava", "original" or "transformers". Default: transformers' where it can express the model."""
    with_code: bool | None = None
    """Put the code beside the model, to load it without this package. Default: for the layout "any_llava"."""
    image_folder: str | None = None
    """Where image paths of a dataset start."""
    facts: CardFacts = field(default_factory=CardFacts)
    data: list[DataEntry] = field(default_factory=list)
    """Data manifest to use instead of that of the facts or of the training record."""
    keep_card: bool = False
    """Take the README.md of a model's folder instead of writing one."""


@dataclass(kw_only=True)
class Exported:
    """A folder that is ready to go up."""

    folder: Path
    kind: str
    layout: str | None = None
    """Layout of a model."""
    notices: list[str] = field(default_factory=list)
    """What a person should know: licences that do not fit, what the layout changes."""
