"""What a run does, step by step: its progress line, and progress.csv and progress.png in its output folder.

What is surprising: a resumed run goes on in the same file, and rows after the checkpoint that it starts from are
written again, so they are dropped first.
"""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from processing_llava.data.fate_counts import FateCounts

from .checkpoints import write_whole

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
