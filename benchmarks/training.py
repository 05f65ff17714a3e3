"""Instruction tuning of one LLaVA: TRL and plain Trainer on transformers' own class, and `llava train`'s trainer.

    python -m benchmarks.training [--device cpu] [--size mid] [--rows 64] [--rows-per-step 8] [--rounds 2]

Same weights, rows, batches, order, float type and optimizer; tower frozen, projector and language model trained. The
losses of every step must be equal to 1e-3 (on a GPU, in 16 bits, 1e-2), or the benchmark fails. Lengths are drawn like
those of LLaVA's instruction data: two thirds of the rows show an image, a fifth of the tokens is supervised. Each
trainer is a process of its own, and they take turns. The first step is left out. Memory is the peak above what was
held before the first step. "mid" is a ViT-B/32 at 384 pixels and a Llama 8x512. 7b and 13b stand for 1.6 billion
parameters (CLIP-L/14-336 and a Llama 24x2048), of which weights, gradients and optimizer fit on one device in 32 bits.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import models
from .peak_memory import read_peak, start_peak
from .report import render_table
from .timing import Row, clock, compare, prepare, run_apart

TRAINERS = {
    "trl": "TRL SFTTrainer as it comes",
    "trl-plain": "TRL SFTTrainer without gradient checkpointing",
    "trainer": "Trainer on transformers' own class",
    "ours": "LlavaTrainer, packed",
}
_BASE_TOWER = {"image_size": 384, "patch_size": 32}
_SMALL = models.SIZES["tiny"][1]
_LARGE = (
    models.SIZES["7b"][0] | {"image_size": models.TILE_SIZE, "patch_size": models.PATCH_SIZE},
    {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
)
SIZES = {
    # The vision tower, and the language model.
    "tiny": (_BASE_TOWER | _SMALL, _SMALL),
    "mid": (
        _BASE_TOWER,
        {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    ),
    "7b": _LARGE,
    "13b": _LARGE,
}
NUM_ROWS = {"tiny": 4, "mid": 24, "7b": 64, "13b": 64}
ROWS_PER_STEP = {"tiny": 2, "mid": 8, "7b": 8, "13b": 8}
WORDS = (
    "the",
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "on",
    "left",
    "right",
    "picture",
    "shows",
    "two",
    "cat",
    "house",
)


def write_inputs(folder: Path, *, size: str, num_rows: int, seed: int = 0) -> None:
    """Write the model in both layouts, pictures, and rows in both formats."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
    from processing_llava import AnyLlavaImageProcessorPil, AnyLlavaProcessor
    from processing_llava.conversation_templates import load_template
    from processing_llava.sentencepiece_tokenizer import load_sentencepiece_tokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tower, language_model = SIZES[size]
    side = tower["image_size"]
    tokenizer = load_sentencepiece_tokenizer(models.GOLDENS)
    tokenizer.pad_token = tokenizer.unk_token
    sides = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    image_processor = AnyLlavaImageProcessorPil(image_aspect_ratio="square", **sides)
    template = load_template("vicuna_v1")
    processor = AnyLlavaProcessor(image_processor, tokenizer, chat_template=template, patch_size=tower["patch_size"])
    vision = CLIPVisionConfig(**tower)
    text = LlamaConfig(vocab_size=32000, pad_token_id=0, **language_model)
    model = AnyLlavaForConditionalGeneration(AnyLlavaConfig(vision, text, image_token_id=processor.image_token_id))
    model.save_pretrained(folder / "ours")
    processor.save_pretrained(folder / "ours")
    model.save_pretrained(folder / "transformers", layout="transformers")

    rows = []
    for index in range(num_rows):
        images = []
        if rng.random() < 0.62:
            path = folder / f"{index}.jpg"
            noise = torch.randint(
                0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
            )
            Image.fromarray(noise.numpy()).resize((640, 480)).save(path)
            images.append(str(path))
        messages: list[dict[str, Any]] = []
        for turn in range(rng.choice((1, 1, 2, 3))):
            question = " ".join(rng.choices(WORDS, k=min(200, int(rng.lognormvariate(3.0, 0.8)))))
            answer = " ".join(rng.choices(WORDS, k=min(250, 1 + int(rng.lognormvariate(2.8, 1.1)))))
            content = [{"type": "image"}] * len(images) if turn == 0 else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        rows.append({"id": str(index), "images": images, "messages": messages})
    (folder / "rows.json").write_text(json.dumps(rows))


def freeze_tower(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)


def build_trainer(kind: str, folder: Path, arguments: dict[str, Any]) -> Any:
    """The trainer of one kind, ready to train."""
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from transformers import (
        AutoProcessor,
        CLIPImageProcessorPil,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Trainer,
        TrainingArguments,
    )
    from trl import SFTConfig, SFTTrainer

    from modeling_llava import AnyLlavaForConditionalGeneration
    from modeling_llava.packed_attention import use_packed_attention
    from modeling_llava.training.recipe import Recipe
    from modeling_llava.training.trainer import LlavaTrainer
    from processing_llava.collator import LlavaDataCollator
    from processing_llava.data_sources import DataSource

    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    dataset = rows.cast_column("images", [ImageFeature()])
    processor = AutoProcessor.from_pretrained(folder / "ours")
    is_ours = kind == "ours"
    model_class = AnyLlavaForConditionalGeneration if is_ours else LlavaForConditionalGeneration
    model = model_class.from_pretrained(folder / ("ours" if is_ours else "transformers"), dtype=torch.float32)
    freeze_tower(model)
    if is_ours:
        use_packed_attention(model)
        recipe = Recipe(stage="finetune", model="", data=[DataSource(path="rows.json")], output_dir="")
        return LlavaTrainer(
            model,
            SFTConfig(**arguments, max_length=None, gradient_checkpointing=False),
            recipe=recipe,
            train_dataset=dataset,
            data_collator=LlavaDataCollator(processor, packed=True),
            processing_class=processor,
        )
    if kind == "trainer":
        return Trainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=dataset,
            data_collator=LlavaDataCollator(processor),
            processing_class=processor,
        )
    tower = model.config.vision_config
    side = tower.image_size
    peer_processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        processor.tokenizer,
        # TRL expects the template to write the first token, where our processor adds it.
        chat_template="{{ bos_token }}" + processor.chat_template,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    settings = {} if kind == "trl" else {"gradient_checkpointing": False}
    config = SFTConfig(**arguments, max_length=None, assistant_only_loss=True, **settings)
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=peer_processor)


def train_once(kind: str, folder: Path, *, device: str, rows_per_step: int) -> dict[str, Any]:
    """Train one epoch in this process; returns seconds and loss of each step, and peak bytes."""
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
        },
    )
    before = start_peak(device)
    times = [clock(device)]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            times.append(clock(device))

    trainer.add_callback(Clock())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [later - earlier for earlier, later in zip(times[1:], times[2:])]
    return {"steps": steps, "losses": losses, "peak": read_peak(device) - before}


def find_largest_difference(results: dict[str, list[dict[str, Any]]], *, device: str) -> float:
    """Of the losses of all steps, relative to those of plain Trainer.

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
    device: str, size: str, rounds: int, *, num_rows: int | None = None, rows_per_step: int | None = None
) -> list[Row]:
    """Rows of `benchmarks.timing`: rows a second and peak memory, beside each peer.

    Raises:
        RuntimeError: if the trainers compute different losses.
    """
    rows_per_step = rows_per_step or ROWS_PER_STEP[size]
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TRAINERS}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), size=size, num_rows=num_rows or NUM_ROWS[size])
        arguments = ("--device", device, "--rows-per-step", str(rows_per_step))
        for _ in range(rounds):
            for kind in TRAINERS:
                results[kind].append(run_apart("benchmarks.training", "--measure", kind, name, *arguments))
    note = f"losses differ by at most {find_largest_difference(results, device=device):.1e}"
    rows = []
    for peer in (kind for kind in TRAINERS if kind != "ours"):
        seconds = {kind: [statistics.mean(run["steps"]) for run in results[kind]] for kind in ("ours", peer)}
        peaks = {kind: [run["peak"] for run in results[kind]] for kind in ("ours", peer)}
        names = {"peer_name": TRAINERS[peer]}
        rows += [
            compare(
                "training", seconds["ours"], seconds[peer], unit="rows/s", amount=rows_per_step, note=note, **names
            ),
            compare("peak memory of training", peaks["ours"], peaks[peer], unit="MB", **names),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=tuple(SIZES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, rows_per_step = arguments.device, arguments.rows_per_step
    if arguments.measure:
        kind, folder = arguments.measure
        print(json.dumps(train_once(kind, Path(folder), device=device, rows_per_step=rows_per_step)))
        return
    rows = measure(device, arguments.size, arguments.rounds, num_rows=arguments.rows, rows_per_step=rows_per_step)
    print(render_table(rows))


if __name__ == "__main__":
    main()
