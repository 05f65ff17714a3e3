"""Files that a training leaves in its folder: record, results, plot, emissions."""

import csv
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data_manifest import DataEntry, build_entries
from .figures import RESULTS_FOLDER, Result, add_source, read_results, read_sourced_json

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
    """The content of these files."""

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
