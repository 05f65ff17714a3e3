"""What a person decides and states about an export, and what comes out of it.

Facts of a card that no file of a run can know are a YAML file given as `--card`, or one of `hub_cards/published`. This
file stands apart from `repository.py` because the files of all kinds, which that one imports, need these classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub_cards
from modeling_llava.records.figures import add_source, read_sourced_yaml, refuse_loose_figures
from modeling_llava.records.training_record import LICENSES, DataEntry, build_entries
from modeling_llava.records.yaml_fields import build

PUBLISHED_FOLDER = Path(hub_cards.__file__).parent / "published"


@dataclass(kw_only=True)
class PublishedFigures:
    """Figures that somebody else measured.

    Raises:
        ValueError: without an address where they stand, or with figures in the note.
    """

    source: str
    """Address of the page or file."""
    values: dict[str, float | int]
    """Value of each benchmark, named with the metric where it has several."""
    note: str | None = None

    def __post_init__(self) -> None:
        if not self.source.startswith("https://"):
            raise ValueError(f"got source={self.source!r} of published figures; expected the address where they stand")
        refuse_loose_figures(self.note or "", "the note of published figures")

    @property
    def sourced_values(self) -> dict[str, Any]:
        return add_source(self.values, self.source)


@dataclass(kw_only=True)
class CardFacts:
    """The words and names of a card. Figures in its texts are refused: they belong into results files.

    Raises:
        ValueError: naming the field, if it has a value that cannot work.
    """

    title: str | None = None
    """Default: the name of the repository."""
    summary: str | None = None
    license: str | None = None
    """Identifier of the Hub."""
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=lambda: ["en"])
    base_model: list[str] = field(default_factory=list)
    """Hub ids. Default: what the training record says."""
    base_licenses: dict[str, str] = field(default_factory=dict)
    """Licence of each base model."""
    datasets: list[str] = field(default_factory=list)
    """Hub ids."""
    data: list[dict | str] = field(default_factory=list)
    """Entries of a data manifest, or keys of `hub_cards/known_data.yaml`. Default: those of the training record."""
    tags: list[str] = field(default_factory=list)
    developers: str | None = None
    contact: str | None = None
    paper: str | None = None
    released: str | None = None
    """Date in words."""
    uses: str | None = None
    misuse: str | None = None
    limits: list[str] = field(default_factory=list)
    training: str | None = None
    """How it was trained, for models without a training record."""
    figures: list[dict] = field(default_factory=list)
    """See `PublishedFigures`."""
    opt_outs: str | None = None
    """How the collection of the data respected reservations of rights holders."""
    removed: str | None = None
    """What was done to remove unlawful content from the data."""

    def __post_init__(self) -> None:
        if self.license is not None and self.license not in LICENSES:
            raise ValueError(
                f"got license={self.license!r}; expected an identifier of the Hub, such as apache-2.0, or other with "
                "license_name and license_link"
            )
        for name in ("title", "summary", "uses", "misuse", "training", "opt_outs", "removed"):
            refuse_loose_figures(getattr(self, name) or "", name)
        for text in self.limits:
            refuse_loose_figures(text, "limits")

    @property
    def data_entries(self) -> list[DataEntry]:
        return build_entries(self.data, where="data")

    @property
    def published_figures(self) -> list[PublishedFigures]:
        return [build(PublishedFigures, item, where="figures") for item in self.figures]

    def require_license(self) -> str:
        """The licence.

        Raises:
            ValueError: if there is none.
        """
        if self.license is None:
            raise ValueError(
                "got no licence; expected one: give --license, such as apache-2.0 or cc-by-4.0, or a --card with it"
            )
        return self.license

    def choose_title(self, repo_id: str) -> str:
        return self.title or repo_id.split("/")[-1]


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


def read_facts(card: str | None) -> CardFacts:
    """The facts of a YAML file, or of a published model by its name.

    Raises:
        ValueError: if there is neither, or a field cannot be used.
    """
    if card is None:
        return CardFacts()
    if Path(card).suffix in (".yaml", ".yml"):
        return build(CardFacts, read_sourced_yaml(Path(card)), where=card)
    published = read_published()
    if card not in published:
        raise ValueError(f"got card {card!r}; expected a YAML file or one of {', '.join(sorted(published))}")
    return published[card]


def read_published() -> dict[str, CardFacts]:
    """The facts of every published model whose card is ready, by its name."""
    found = {}
    for path in sorted(PUBLISHED_FOLDER.glob("*.yaml")):
        models = read_sourced_yaml(path)["models"]
        found |= {name: build(CardFacts, fields, where=f"{path.name}: {name}") for name, fields in models.items()}
    return found
