"""What a run tells of itself: its progress line, progress.csv and progress.png, and at its end training_record.json.

All losses come from one place, the Trainer's `state.log_history`, which its checkpoints hold (trainer_state.json);
`read_log` reads it, and the table, the curves and the record are written from that. So a resumed run goes on where its
checkpoint ends, and no row stands twice. One thing comes back from progress.csv: an evaluation after the checkpoint.

What is surprising: `seconds` and `first_step` of the record belong to the process that ended the run; a run that was
resumed took longer. Pictures are not hashed one by one: the files of rows that name them are.
"""

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
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

from modeling_llava.records.training_record import RECORD_FILE, read_manifest
from processing_llava.data.data_sources import ROW_FILES, DataSource
from processing_llava.data.row_datasets import FateCounts
from processing_llava.original.original_folder import find_installed

from .recipe import Recipe
from .run_folder import write_whole
from .starting_model import count_parameters

logger = logging.get_logger(__name__)

RATES = ("rows_per_second", "tokens_per_second", "useful", "seconds_left")
"""Throughput beside each loss; `useful` is the share of tokens that are not padding."""


def read_log(state: TrainerState) -> list[dict[str, Any]]:
    """Every log of a run with a loss of training or evaluation, in order."""
    return [log for log in state.log_history if "loss" in log or "eval_loss" in log]


class RunLog(TrainerCallback):
    """Counts rows and tokens, and writes progress.csv, for people, whenever the Trainer logs.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "progress.csv"
        self.has_stepped = False
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
        self._restart_counts(step=state.global_step)
        self._read_last_evaluation(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_stepped = True
        # A run may be shorter than `logging_steps`.
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        lines = read_log(state)
        # The last log may be another, such as the summary of the run. Before the first step the file of an earlier run
        # stays; the history keeps an evaluation of then.
        is_line = bool(lines) and lines[-1] is state.log_history[-1] and state.global_step > 0
        if not state.is_world_process_zero or not is_line:
            return
        columns = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", *RATES)
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(line | {"epoch": round(line.get("epoch", 0), 4)} for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, table.getvalue())

    def plot(self, state: TrainerState) -> None:
        """Write progress.png: loss and throughput over the steps, if anything was logged."""
        if not read_log(state):
            return
        # Not pyplot: it keeps figures, and looks for a screen.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        for axes, names in zip(figure.subplots(2, 1, sharex=True), (("loss", "eval_loss"), ("tokens_per_second",))):
            for name in names:
                points = [(line["step"], line[name]) for line in read_log(state) if name in line]
                # A line through few points is hardly seen, and through one not at all.
                axes.plot(*zip(*points), marker="o" if len(points) < 30 else None, label=name.replace("_", " "))
            if len(axes.lines) > 1:
                axes.legend()
            axes.set_ylabel(names[0].replace("_", " "))
            axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        figure.savefig(self.path.with_suffix(".png"), dpi=100)

    def _read_last_evaluation(self, state: TrainerState) -> None:
        """Read an evaluation back that the checkpoint to go on from does not hold.

        At the end of an epoch the Trainer may evaluate after the checkpoint of its last step (transformers 5.23,
        trainer.py).
        """
        step = state.global_step
        is_known = any("eval_loss" in log and log["step"] == step for log in state.log_history)
        if step == 0 or is_known or not self.path.is_file() or not state.is_world_process_zero:
            return
        with self.path.open(newline="") as file:
            for line in csv.DictReader(file):
                if int(line["step"]) == step and line["eval_loss"]:
                    log = {"eval_loss": float(line["eval_loss"]), "epoch": float(line["epoch"]), "step": step}
                    state.log_history.append(log)

    def _restart_counts(self, *, step: int) -> None:
        self.step = step
        self.start = time.perf_counter()
        self.rows = self.tokens = self.places = 0


class ProgressLine(ProgressCallback):
    """The Trainer's progress line, with throughput; after a resume, time left counts from there."""

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
        recipe: The recipe of the run.
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
        counts, log = count_parameters(model), read_log(state)
        losses, eval_losses = (
            [{"step": line["step"], "loss": line[name]} for line in log if name in line]
            for name in ("loss", "eval_loss")
        )
        record = self.origin | {
            "hyperparameters": {name: getattr(args, name) for name in HYPERPARAMETERS},
            "parameters": {part: {"total": total, "trained": trained} for part, (total, trained) in counts.items()},
            "steps": state.global_step,
            "first_step": self.first_step,
            "seconds": round(time.perf_counter() - self.start, 3),
            "losses": losses,
            "eval_losses": eval_losses,
            "hardware": _describe_hardware(),
            "versions": _describe_versions(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


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


def _describe_hardware() -> dict[str, Any]:
    """Name and number of the devices of this machine."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
    return {"device": _name_cpu(), "threads": torch.get_num_threads()}


def _name_cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _describe_versions() -> dict[str, str]:
    """Versions of everything that computes, and the commit of this package where it runs from a checkout."""
    packages = ("anyllava", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in packages if name in installed}
    git, checkout = shutil.which("git"), Path(__file__).parents[2]
    if git is not None and (checkout / ".git").exists():
        command = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
        # git refuses the checkouts of other users; no run is lost for want of a commit.
        if commit := subprocess.run(command, capture_output=True, text=True).stdout.strip():
            versions["commit"] = commit
    return versions
