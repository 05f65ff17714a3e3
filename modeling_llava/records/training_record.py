"""What a training leaves in its folder: record, results, plot, emissions, and the manifest of its data.

The manifest is a YAML list that a recipe names as `data_manifest`, or `llava export` is given. It holds what no
program can find out: licences, who is in the pictures, whom to ask. Cards and TRAINING_DATA_SUMMARY.md are filled from
it.
"""

import csv
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hub_cards

from .figures import (
    RESULTS_FOLDER,
    Result,
    add_source,
    read_results,
    read_sourced_json,
    read_sourced_yaml,
    refuse_loose_figures,
)
from .yaml_fields import build

# fmt: off
LICENSES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2",
    "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl",
    "odc-by", "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl",
    "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
})
"""Identifiers that the Hub accepts: https://huggingface.co/docs/hub/repositories-licenses."""
# fmt: on
DATA_KINDS = {
    "public": "Publicly available datasets",
    "licensed": "Data licensed from rights holders",
    "private": "Other private datasets of third parties",
    "crawled": "Data crawled from the web",
    "user": "Data of users",
    "synthetic": "Data made by models or programs",
    "other": "Other data",
}
"""Kinds in the order of the EU AI Act's template of a public summary (2.1, 2.2.1, 2.2.2, 2.3, 2.4, 2.5, 2.6)."""
NOT_STATED = "not stated"
KNOWN_DATA = Path(hub_cards.__file__).parent / "known_data.yaml"
"""Datasets of published LLaVAs."""


@dataclass(kw_only=True)
class DataEntry:
    """One source of training data.

    Raises:
        ValueError: an unknown kind or licence, synthetic data without its maker, crawled data without its domains, or
            figures of a measurement in a text.
    """

    name: str
    kind: str
    """A key of `DATA_KINDS`."""
    license: str | None = None
    """Identifier of the Hub; None where nobody stated one."""
    link: str | None = None
    """Address where it can be read about, or had."""
    rows: int | None = None
    images: int | None = None
    used_for: str = NOT_STATED
    """Stage of the training."""
    collected: str = NOT_STATED
    """Time in words, e.g. "2014 to 2015"."""
    personal_data: str = NOT_STATED
    """People who can be recognised in it, and what was done about it."""
    contact: str = NOT_STATED
    """Person or page to ask to take something out."""
    made_by: str | None = None
    """The models or programs that made synthetic data."""
    domains: list[str] = field(default_factory=list)
    """Main domains of crawled data."""
    note: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in DATA_KINDS:
            raise ValueError(f"got kind={self.kind!r} for data {self.name}; expected one of {', '.join(DATA_KINDS)}")
        if self.license is not None and self.license not in LICENSES:
            raise ValueError(
                f"got license={self.license!r} for data {self.name}; expected an identifier of the Hub, such as "
                "cc-by-4.0, or other"
            )
        if self.kind == "synthetic" and self.made_by is None:
            raise ValueError(f"got synthetic data {self.name} without made_by; expected the models that made it")
        if self.kind == "crawled" and not self.domains:
            raise ValueError(f"got crawled data {self.name} without domains; expected the main ones")
        for text in (self.used_for, self.personal_data, self.made_by, self.note):
            refuse_loose_figures(text or "", f"data {self.name}")


def read_manifest(path: str | Path) -> list[DataEntry]:
    """The entries of a manifest.

    Raises:
        ValueError: naming the file and the field.
    """
    entries = read_sourced_yaml(Path(path))
    if not isinstance(entries, list):
        raise ValueError(f"got {path}; expected a list of {{name, kind, license, personal_data, contact, ...}}")
    return build_entries(entries, where=str(path))


def build_entries(entries: list[Any], *, where: str) -> list[DataEntry]:
    """Data entries from their fields, or from keys of `hub_cards/known_data.yaml`.

    Raises:
        ValueError: naming `where` and the field or key.
    """
    known = read_sourced_yaml(KNOWN_DATA) if any(isinstance(entry, str) for entry in entries) else {}
    for entry in entries:
        if isinstance(entry, str) and entry not in known:
            raise ValueError(f"got data {entry!r} in {where}; expected fields, or one of {', '.join(known)}")
    return [build(DataEntry, known[entry] if isinstance(entry, str) else entry, where=where) for entry in entries]


# Files of a run.

RECORD_FILE = "training_record.json"
PLOT_FILE = "progress.png"
EMISSIONS_FILE = "emissions.csv"
"""codecarbon writes it (`report_to: codecarbon` in a recipe), one line for each run."""
EMISSIONS_NUMBERS = ("emissions", "energy_consumed")
"""Columns in kg of CO2 equivalent and in kWh."""
EMISSIONS_NAMES = ("country_name", "gpu_model", "cpu_model")
"""Columns that leave this machine beside the numbers; codecarbon also writes its place, as longitude and latitude."""
CARRIED_FILES = (RECORD_FILE, PLOT_FILE, "progress.csv", EMISSIONS_FILE)
"""Files that go along with the weights, as `results/*.json` do."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of the files of a training."""

    stages: list[dict[str, Any]]
    """Training records, the first stage first; numbers know their file."""
    results: list[Result]
    plot: str | None
    emissions: dict[str, Any] | None
    """`EMISSIONS_NUMBERS` of all runs together, and `EMISSIONS_NAMES`."""

    @property
    def data_entries(self) -> list[DataEntry]:
        """The data manifests of all stages."""
        return build_entries([entry for stage in self.stages for entry in stage["data_manifest"]], where=RECORD_FILE)

    @property
    def hub_datasets(self) -> list[str]:
        return [source["path"] for stage in self.stages for source in stage["data"] if "revision" in source]

    @property
    def base_model(self) -> str | None:
        """Hub id that training started from, as far as the first record tells."""
        return self.stages[0]["base_model"] if self.stages else None


def read_run_files(folder: Path) -> RunFiles:
    """The files of a training in a folder.

    Raises:
        ValueError: naming a file that cannot be used.
    """
    stages = []
    if (folder / RECORD_FILE).is_file():
        record = read_sourced_json(folder / RECORD_FILE, root=folder)
        while record is not None:
            stages.insert(0, record)
            record = record["previous"]
    return RunFiles(
        stages=stages,
        results=read_results(folder),
        plot=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        emissions=_sum_emissions(folder / EMISSIONS_FILE) if (folder / EMISSIONS_FILE).is_file() else None,
    )


def carry_files(source: Path, out: Path) -> None:
    """Copy the files of a training that belong into its repository; of the emissions only what a card says."""
    found = [source / name for name in CARRIED_FILES] + sorted((source / RESULTS_FOLDER).glob("*.json"))
    found += sorted(source.glob("LICENSE*"))
    for path in filter(Path.is_file, found):
        copy = out / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if (out / EMISSIONS_FILE).is_file():
        lines = _read_lines(out / EMISSIONS_FILE)
        with (out / EMISSIONS_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*EMISSIONS_NUMBERS, *EMISSIONS_NAMES], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)


def _sum_emissions(path: Path) -> dict[str, Any]:
    """The sum over all lines; a run that was resumed wrote several."""
    lines = _read_lines(path)
    numbers = {name: math.fsum(float(line[name]) for line in lines) for name in EMISSIONS_NUMBERS}
    names = {name: ", ".join(dict.fromkeys(filter(None, (line[name] for line in lines)))) for name in EMISSIONS_NAMES}
    return names | add_source(numbers, EMISSIONS_FILE)


def _read_lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
