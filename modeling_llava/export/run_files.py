"""What a trained folder says of its training: record, results, plot, emissions."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data_manifest import DataEntry, build_entries
from .figures import RESULTS_FOLDER, Result, add_source, read_results, read_sourced_json

RECORD_FILE = "training_record.json"
PLOT_FILE = "progress.png"
EMISSIONS_FILE = "emissions.csv"
"""Written by codecarbon (`report_to: codecarbon` in a recipe)."""
CARRIED_FILES = (RECORD_FILE, PLOT_FILE, "progress.csv", EMISSIONS_FILE)
"""What goes along with the weights; so do `results/*.json`."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What was found in a folder."""

    stages: list[dict[str, Any]]
    """Training records, the first stage first; numbers know their file."""
    results: list[Result]
    plot: str | None
    emissions: dict[str, Any] | None
    """The last line of emissions.csv: `emissions` in kg, `energy_consumed` in kWh, and names."""

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
    """What the folder holds.

    Raises:
        ValueError: naming a file that cannot be used.
    """
    stages = []
    if (folder / RECORD_FILE).is_file():
        record = read_sourced_json(folder / RECORD_FILE, root=folder)
        while record is not None:
            stages.insert(0, record)
            record = record["previous"]
    emissions = None
    if (folder / EMISSIONS_FILE).is_file():
        with (folder / EMISSIONS_FILE).open(newline="") as file:
            *_, line = csv.DictReader(file)
        numbers = {name: float(line[name]) for name in ("emissions", "energy_consumed")}
        emissions = line | add_source(numbers, EMISSIONS_FILE)
    return RunFiles(
        stages=stages,
        results=read_results(folder),
        plot=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        emissions=emissions,
    )


def list_carried_files(folder: Path) -> list[Path]:
    """The files of a training that belong into its repository, as paths from the folder."""
    found = [folder / name for name in CARRIED_FILES] + sorted((folder / RESULTS_FOLDER).glob("*.json"))
    found += sorted(folder.glob("LICENSE*"))
    return [path.relative_to(folder) for path in found if path.is_file()]
