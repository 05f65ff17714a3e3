"""What a run writes down: its progress line, progress.csv and progress.png, and at its end training_record.json.

What is surprising: a resumed run goes on in the same progress.csv, and rows after the checkpoint that it starts from
are written again, so they are dropped first. `seconds` and `first_step` of the record belong to the process that ended
the run; a run that was resumed took longer. Pictures are not hashed one by one: the files of rows that name them are.
"""

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import math
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import try_to_load_from_cache
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from modeling_llava.records.data_manifest import read_manifest
from modeling_llava.records.run_files import RECORD_FILE
from processing_llava.data.data_sources import ROW_FILES, DataSource
from processing_llava.data.row_datasets import FateCounts
from processing_llava.original.original_folder import find_installed

from .checkpoints import write_whole
from .parts import count_parameters
from .recipe import Recipe

logger = logging.get_logger(__name__)

RATES = ("rows_per_second", "tokens_per_second", "useful", "seconds_left")
"""`useful` is the share of tokens that are not padding."""
FEW_POINTS = 30
"""Below it each point of a curve is drawn."""
COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", *RATES)


class RunLog(TrainerCallback):
    """Counts rows and tokens, writes a line whenever the Trainer logs, and draws both curves when it is asked to.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "progress.csv"
        self.lines: list[dict[str, Any]] = []
        self._restart_counts(step=0)

    def count(self, batch: dict[str, Any]) -> None:
        """Take note of a batch of this process."""
        num_places = batch["input_ids"].numel()
        bounds = batch.get("cu_seq_lens_q")
        if bounds is not None:
            self.rows += len(bounds) - 1
            self.tokens += num_places
        else:
            self.rows += len(batch["input_ids"])
            self.tokens += int(batch["attention_mask"].sum())
        self.places += num_places

    def take_rates(self, state: TrainerState, *, num_processes: int) -> dict[str, float]:
        """`RATES` since they were taken the last time."""
        # Processes have about equally many rows; those of this one stand for all.
        seconds = time.perf_counter() - self.start
        seconds_per_step = seconds / max(state.global_step - self.step, 1)
        rates = {
            "rows_per_second": round(self.rows * num_processes / seconds, 3),
            "tokens_per_second": round(self.tokens * num_processes / seconds, 1),
            "useful": round(self.tokens / max(self.places, 1), 4),
            "seconds_left": round(seconds_per_step * (state.max_steps - state.global_step), 3),
        }
        self._restart_counts(step=state.global_step)
        return rates

    def leave_out(self, seconds: float) -> None:
        """Let an evaluation not count as time that steps took."""
        self.start += seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step and self.path.is_file():
            with self.path.open(newline="") as file:
                self.lines = [line for line in csv.DictReader(file) if int(line["step"]) <= state.global_step]
        self._restart_counts(step=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run may be shorter than `logging_steps`.
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        place = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        self.lines.append({name: logs[name] for name in COLUMNS if name in logs} | place)
        self._write()

    def draw(self) -> None:
        """Draw what was logged, if anything was."""
        if self.lines:
            draw(self.lines, self.path.with_suffix(".png"))

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.lines)
        write_whole(self.path, table.getvalue())

    def _restart_counts(self, *, step: int) -> None:
        self.step = step
        self.start = time.perf_counter()
        self.rows = self.tokens = self.places = 0


class ProgressLine(ProgressCallback):
    """The Trainer's progress line with throughput in it; after a resume, time left counts from there."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "rows_per_second" in logs:
            self.training_bar.set_postfix_str(
                f"{logs['rows_per_second']:.1f} rows/s, {logs['tokens_per_second']:,.0f} tokens/s, "
                f"{logs['useful']:.0%} useful"
            )


class StreamReport(TrainerCallback):
    """Logs at the end what became of streaming rows, which no count knows before they are read.

    Args:
        fates: Is counted up while rows are read.
    """

    def __init__(self, fates: FateCounts) -> None:
        self.fates = fates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Some were read to estimate the memory of a step.
        self.fates.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for fate, number in self.fates.items():
            logger.warning(f"{number:,} streaming rows read: {fate}")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss and throughput over the steps, as a picture."""
    # Not pyplot: it keeps figures, and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, names in zip(figure.subplots(2, 1, sharex=True), (("loss", "eval_loss"), ("tokens_per_second",))):
        for name in names:
            # What a line does not have is empty in the file, from which a resumed run reads it.
            points = [(int(line["step"]), float(line[name])) for line in lines if line.get(name) not in (None, "")]
            # A line through one point is not seen.
            marker = "o" if len(points) < FEW_POINTS else None
            axes.plot(*zip(*points), marker=marker, label=name.replace("_", " "))
        if len(axes.lines) > 1:
            axes.legend()
        axes.set_ylabel(names[0].replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=100)


def check_loss(loss: torch.Tensor, *, step: int) -> None:
    """Stop a run whose loss is no number, before it is trained into the weights.

    Raises:
        ValueError: naming the step.
    """
    _check_number("a loss", loss.item(), step=step)


def check_gradient(norm: torch.Tensor | float, *, step: int) -> None:
    """Stop a run whose gradient is no number, which can be under a loss that is one, before the optimizer's step.

    Raises:
        ValueError: naming the step.
    """
    _check_number("a gradient with a norm", float(norm), step=step)


def _check_number(what: str, value: float, *, step: int) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"got {what} of {value} at step {step}; expected a number: lower the learning rate, or look for a broken "
            "row with `llava check-data`; the last checkpoint is unharmed"
        )


PACKAGES = ("anyllava", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
HYPERPARAMETERS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2",
    "max_grad_norm", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "bf16", "fp16", "gradient_checkpointing", "seed",
)  # fmt: skip
"""Settings of the Trainer that decide the result, as they were resolved."""


class TrainingRecord(TrainerCallback):
    """Writes the record into the run's output folder when training ends.

    What the run starts from is described when this is made, so that a missing file is an error before training.

    Args:
        recipe: Of the run.
        dataset: The rows that are trained on.

    Raises:
        ValueError: if the data manifest of the recipe cannot be used.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset | IterableDataset) -> None:
        base = Path(find_installed(recipe.model))
        previous = base / RECORD_FILE
        manifest = [] if recipe.data_manifest is None else read_manifest(recipe.data_manifest)
        self.origin = {
            "recipe": dataclasses.asdict(recipe),
            "base_model": None if base.exists() else recipe.model,
            "previous": json.loads(previous.read_text(encoding="utf-8")) if previous.is_file() else None,
            "data": [describe_source(source) for source in recipe.data],
            "eval_data": [describe_source(source) for source in recipe.eval_data],
            "data_manifest": [dataclasses.asdict(entry) for entry in manifest],
            "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.perf_counter()
        self.first_step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        path = Path(args.output_dir) / RECORD_FILE
        # A run that was over when it was resumed has its record.
        if not state.is_world_process_zero or (state.global_step == self.first_step and path.is_file()):
            return
        counts = count_parameters(model)
        record = self.origin | {
            "hyperparameters": {name: getattr(args, name) for name in HYPERPARAMETERS},
            "parameters": {part: {"total": total, "trained": trained} for part, (total, trained) in counts.items()},
            "steps": state.global_step,
            "first_step": self.first_step,
            "seconds": round(time.perf_counter() - self.start, 3),
            "losses": read_losses(state, "loss"),
            "eval_losses": read_losses(state, "eval_loss"),
            "hardware": describe_hardware(),
            "versions": describe_versions(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def read_losses(state: TrainerState, name: str) -> list[dict[str, float]]:
    """Step and value of each loss of this name."""
    return [{"step": log["step"], "loss": log[name]} for log in state.log_history if name in log]


def describe_source(source: DataSource) -> dict[str, Any]:
    """What identifies the rows of a source: the hash of its files, or the commit of a Hub dataset.

    `sha256` is over all files of rows in the order of their names; `revision` is None where the Hub's cache does not
    tell.
    """
    path = Path(source.path)
    if not path.exists():
        cached = try_to_load_from_cache(source.path, "README.md", repo_type="dataset")
        return {"path": source.path, "revision": Path(cached).parent.name if isinstance(cached, str) else None}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in ROW_FILES)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    num_bytes = sum(file.stat().st_size for file in files)
    return {"path": source.path, "files": len(files), "bytes": num_bytes, "sha256": digest.hexdigest()}


def describe_hardware() -> dict[str, Any]:
    """Name and number of the devices of this machine."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
    return {"device": _processor_name(), "threads": torch.get_num_threads()}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """Versions of everything that computes, and the commit of this package where it runs from a checkout."""
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in PACKAGES if name in installed}
    git, checkout = shutil.which("git"), Path(__file__).parents[2]
    if git is not None and (checkout / ".git").exists():
        command = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
        # git refuses the checkouts of other users; no run is lost for want of a commit.
        if commit := subprocess.run(command, capture_output=True, text=True).stdout.strip():
            versions["commit"] = commit
    return versions
