"""training_record.json: what a run was made of and what came out, for the model card.

What is surprising: `seconds` and `first_step` belong to the process that ended the run; a run that was resumed took
longer. Pictures are not hashed one by one: the files of rows that name them are.
"""

import dataclasses
import hashlib
import importlib.metadata
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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_llava.records.data_manifest import read_manifest
from modeling_llava.records.run_files import RECORD_FILE
from processing_llava.data.data_sources import ROW_FILES, DataSource
from processing_llava.original.original_folder import find_installed

from .recipe import Recipe
from .trainer import count_parameters

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
