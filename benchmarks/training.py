"""Instruction tuning of one LLaVA: TRL and plain Trainer on transformers' own class, and `llava train`'s trainer.

    python -m benchmarks.training [--device cpu] [--size mid] [--rows 64] [--rows-per-step 8] [--rounds 2]

Same weights, rows, batches, order, dtype and optimizer; the tower is frozen, and projector and language model are
trained, or adapters in the language model (LoRA) beside the projector. The losses of every step must be equal to 1e-3
(on a GPU, in 16 bits, 1e-2), or the benchmark fails. Lengths are sampled like those of LLaVA's instruction data: two
thirds of the rows show an image, a fifth of the tokens is supervised. Each trainer is a process of its own, and they
take turns; on a GPU, each has four more that prepare batches. The first step is left out, and on a GPU, where blocks
are compiled, the second. Memory is the peak above what was held before the first step. Useful tokens are all but
padding. Adapters are trained with gradient checkpointing too, which takes time and saves memory: TRL does so by
default, `llava train` where a step would not fit without it.

"mid" is a ViT-B/32 at 384 pixels and a Llama 8x512. 7b and 13b are those of LLaVA-1.5 for LoRA; trained whole, they
stand for 1.6 billion parameters (CLIP-L/14-336 and a Llama 24x2048), of which weights, gradients and optimizer fit on
one device in 32 bits.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .peak_memory import read_peak, start_peak
from .report import render_table
from .roofline import count_operations
from .timing import Row, build_parser, clock, compare, prepare, run_apart
from .training_inputs import build_model, build_processor, write_rows

PEERS = {
    "trl": "TRL SFTTrainer as it comes",
    "trl-plain": "TRL SFTTrainer without gradient checkpointing",
    "trainer": "Trainer on transformers' own class",
}
OURS = {"ours": "", "ours-checkpointing": ", checkpointing", "ours-compiled": ", compiled blocks"}
"""Our trainers, and what the names of their rows end in."""
STAGES = {
    "finetune": ("trl", "trl-plain", "trainer", "ours"),
    "lora": ("trl", "trainer", "ours", "ours-checkpointing"),
}
COMPILED_ON = ("cuda",)
"""Devices on which ours is trained with compiled blocks too; on a CPU compiling would take longer than training."""
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
"""Without dropout, since every trainer would sample another one; with a small rank, since "mid" is narrow."""
PEER_LORA = LORA | {
    "target_modules": r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
    "modules_to_save": ["multi_modal_projector"],
}
NUM_ROWS = {"tiny": 4, "mid": 24, "7b": 64, "13b": 64}
ROWS_PER_STEP = {"tiny": 2, "mid": 8, "7b": 8, "13b": 8}


def freeze_tower(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)


def build_trainer(kind: str, folder: Path, arguments: dict[str, Any], *, stage: str, size: str, device: str) -> Any:
    """The trainer of one kind, ready to train."""
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPImageProcessorPil, LlavaProcessor, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from modeling_llava.acceleration.fused_layers import fuse_norms
    from modeling_llava.acceleration.packed_attention import use_packed_attention
    from modeling_llava.training.recipe import Recipe
    from modeling_llava.training.run import compile_blocks
    from modeling_llava.training.starting_model import add_lora
    from modeling_llava.training.trainer import LlavaTrainer
    from processing_llava.data.collator import LlavaDataCollator
    from processing_llava.data.data_sources import DataSource

    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    dataset = rows.cast_column("images", [ImageFeature()])
    processor = build_processor(size)
    model = build_model(stage, size, device=device, is_peer=kind in PEERS)
    freeze_tower(model)
    if kind in OURS:
        use_packed_attention(model)
        if device == "cuda":
            fuse_norms(model.model.language_model)
        recipe = Recipe(stage=stage, model="", data=[DataSource(path="rows.json")], output_dir="out")
        if stage == "lora":
            model = add_lora(model, LORA, trained_parts=recipe.trained_parts, autocast=arguments["bf16"])
        if kind == "ours-compiled":
            compile_blocks(model.get_base_model() if stage == "lora" else model, checkpointing=False)
        return LlavaTrainer(
            model,
            SFTConfig(**arguments, max_length=None, gradient_checkpointing=kind == "ours-checkpointing"),
            recipe=recipe,
            train_dataset=dataset,
            data_collator=LlavaDataCollator(processor, packed=True),
            processing_class=processor,
        )
    if kind == "trainer":
        return Trainer(
            get_peft_model(model, LoraConfig(**PEER_LORA)) if stage == "lora" else model,
            TrainingArguments(**arguments),
            train_dataset=dataset,
            data_collator=LlavaDataCollator(processor),
            processing_class=processor,
        )
    side = model.config.vision_config.image_size
    peer_processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        processor.tokenizer,
        # TRL takes what the template writes and adds no first token (TRL 1.16, trainer/sft_trainer.py); ours adds it.
        chat_template="{{ bos_token }}" + processor.chat_template,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    settings = {} if kind == "trl" else {"gradient_checkpointing": False}
    config = SFTConfig(**arguments, max_length=None, assistant_only_loss=True, **settings)
    adapter = LoraConfig(**PEER_LORA) if stage == "lora" else None
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=peer_processor, peft_config=adapter)


def count_work(trainer: Any) -> dict[str, float]:
    """Operations and useful tokens of all packed batches."""
    operations = tokens = 0
    for batch in trainer.get_train_dataloader():
        tokens += batch["input_ids"].numel()
        operations += count_operations(partial(trainer.training_step, trainer.model, batch))
    return {"operations": operations, "tokens": tokens}


def train_once(kind: str, folder: Path, *, stage: str, size: str, device: str, rows_per_step: int) -> dict[str, Any]:
    """Train one epoch in this process; returns seconds and loss of each step, peak bytes, and of ours the work."""
    from transformers import TrainerCallback

    prepare(device)
    is_cpu = device == "cpu"
    trainer = build_trainer(
        kind,
        folder,
        {
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": rows_per_step,
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": is_cpu,
            "bf16": not is_cpu,
            "dataloader_num_workers": 0 if is_cpu else 4,
        },
        stage=stage,
        size=size,
        device=device,
    )
    before = start_peak(device)
    times = [clock(device)]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            times.append(clock(device))

    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first = 1 if is_cpu else 2
    steps = [later - earlier for earlier, later in zip(times[first:], times[first + 1 :])]
    result = {"steps": steps, "losses": losses, "peak": read_peak(device) - before}
    return result | (count_work(trainer) if kind == "ours" else {})


def find_largest_difference(results: dict[str, list[dict[str, Any]]], *, device: str) -> float:
    """Largest difference between the losses of all steps, relative to those of plain Trainer.

    Raises:
        RuntimeError: if the trainers did not compute the same.
    """
    expected = results["trainer"][0]["losses"]
    difference = max(
        abs(loss - reference) / reference
        for runs in results.values()
        for run in runs
        for loss, reference in zip(run["losses"], expected, strict=True)
    )
    if difference > (1e-3 if device == "cpu" else 1e-2):
        raise RuntimeError(f"the trainers compute different losses: they differ by {difference:.1e}")
    return difference


def measure(
    device: str,
    size: str,
    rounds: int,
    *,
    num_rows: int | None = None,
    rows_per_step: int | None = None,
    stages: Sequence[str] = tuple(STAGES),
) -> Iterator[Row]:
    """Rows of `benchmarks.timing`: rows and useful tokens a second and peak memory, beside each peer.

    Raises:
        RuntimeError: if the trainers compute different losses.
    """
    num_rows, rows_per_step = num_rows or NUM_ROWS[size], rows_per_step or ROWS_PER_STEP[size]
    options = ("--device", device, "--size", size, "--rows-per-step", str(rows_per_step))
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), num_rows=num_rows)
        for stage in stages:
            if stage not in STAGES:
                raise ValueError(f"got stage {stage!r}; expected one of {', '.join(STAGES)}")
            kinds = STAGES[stage] + (("ours-compiled",) if device in COMPILED_ON else ())
            results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind in kinds:
                    results[kind].append(run_apart("benchmarks.training", "--measure", kind, stage, folder, *options))
            yield from compare_trainers(
                results, stage=stage, num_rows=num_rows, rows_per_step=rows_per_step, device=device
            )


def compare_trainers(
    results: dict[str, list[dict[str, Any]]], *, stage: str, num_rows: int, rows_per_step: int, device: str
) -> list[Row]:
    """The rows of one stage."""
    note = f"losses differ by at most {find_largest_difference(results, device=device):.1e}"
    name = {"finetune": "training", "lora": "training LoRA"}[stage]
    work = results["ours"][0]
    per_row = {"operations": work["operations"] / num_rows}
    per_token = {"operations": work["operations"] / work["tokens"]}
    tokens_per_step = rows_per_step * work["tokens"] / num_rows
    seconds = {kind: [statistics.mean(run["steps"]) for run in runs] for kind, runs in results.items()}
    peaks = {kind: [run["peak"] for run in runs] for kind, runs in results.items()}
    rows = []
    for ours, peer in product(OURS, PEERS):
        if not {ours, peer} <= results.keys():
            continue
        title, times, names = name + OURS[ours], (seconds[ours], seconds[peer]), {"peer_name": PEERS[peer]}
        rows += [
            compare(title, *times, unit="rows/s", amount=rows_per_step, note=note, **names, **per_row),
            compare(f"{title}, useful", *times, unit="tokens/s", amount=tokens_per_step, **names, **per_token),
            compare(f"peak memory of {title}", peaks[ours], peaks[peer], unit="MB", **names),
        ]
    return rows


def main() -> None:
    parser = build_parser(__doc__, rounds=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "STAGE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, rows_per_step = arguments.device, arguments.rows_per_step
    if arguments.measure:
        kind, stage, folder = arguments.measure
        settings = {"stage": stage, "size": arguments.size, "device": device, "rows_per_step": rows_per_step}
        print(json.dumps(train_once(kind, Path(folder), **settings)))
        return
    rows = measure(device, arguments.size, arguments.rounds, num_rows=arguments.rows, rows_per_step=rows_per_step)
    print(render_table(list(rows)))


if __name__ == "__main__":
    main()
