"""Instruction tuning of one LLaVA: TRL and plain Trainer on transformers' own class, and `llava train`'s trainer.

    python -m benchmarks.training [--device cpu] [--rows 64] [--rows-per-step 8] [--rounds 2]

Same weights, rows, batches, order, float type and optimizer; tower frozen, projector and language model trained. The
losses of every step must be equal to 1e-3, or the benchmark fails. Lengths are drawn like those of LLaVA's
instruction data: two thirds of the rows show an image, a fifth of the tokens is supervised. Each trainer is a process
of its own, and they take turns. On a CPU, seconds are those of the processor on one thread, so that other work on the
machine does not count. The first step is left out.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

TRAINERS = {
    "trl": "TRL SFTTrainer as it comes",
    "trl-plain": "TRL SFTTrainer without gradient checkpointing",
    "trainer": "Trainer on transformers' own class",
    "ours": "LlavaTrainer, packed",
}
SIZES = {
    # Hidden size, layers and heads of the language model; the tower is a ViT-B/32 at 384 pixels, 144 tokens.
    "mid": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
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
    tokenizer = load_sentencepiece_tokenizer(Path("tests/goldens"))
    tokenizer.pad_token = tokenizer.unk_token
    sides = {"size": {"shortest_edge": 384}, "crop_size": {"height": 384, "width": 384}}
    image_processor = AnyLlavaImageProcessorPil(image_aspect_ratio="square", **sides)
    template = load_template("vicuna_v1")
    processor = AnyLlavaProcessor(image_processor, tokenizer, chat_template=template, patch_size=32)
    vision = CLIPVisionConfig(image_size=384, patch_size=32)
    text = LlamaConfig(vocab_size=32000, pad_token_id=0, **SIZES[size])
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


def build_trainer(kind: str, folder: Path, arguments: dict[str, Any], rows_per_step: int) -> Any:
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

    dataset = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
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
    peer_processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size={"height": 384, "width": 384}),
        processor.tokenizer,
        # TRL expects the template to write the first token, where our processor adds it.
        chat_template="{{ bos_token }}" + processor.chat_template,
        patch_size=32,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    settings = {} if kind == "trl" else {"gradient_checkpointing": False}
    dataset = dataset.cast_column("images", [ImageFeature()])
    config = SFTConfig(**arguments, max_length=None, assistant_only_loss=True, **settings)
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=peer_processor)


def measure(kind: str, folder: Path, *, device: str, rows_per_step: int) -> None:
    """Train one epoch in this process and print steps, losses and memory as JSON."""
    from transformers import TrainerCallback

    is_cpu = device == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    if is_cpu:
        torch.set_num_threads(1)
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
        rows_per_step,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [clock()]

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            if not is_cpu:
                torch.cuda.synchronize()
            times.append(clock())

    trainer.add_callback(Clock())
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    peak = peak * 1024 if is_cpu else torch.cuda.max_memory_allocated()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [later - earlier for earlier, later in zip(times[1:], times[2:])]
    print(json.dumps({"steps": steps, "losses": losses, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=tuple(SIZES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, folder = arguments.measure
        measure(kind, Path(folder), device=arguments.device, rows_per_step=arguments.rows_per_step)
        return
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TRAINERS}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), size=arguments.size, num_rows=arguments.rows)
        for _ in range(arguments.rounds):
            for kind in TRAINERS:
                command = [sys.executable, "-m", "benchmarks.training", "--measure", kind, name]
                command += ["--device", arguments.device, "--rows-per-step", str(arguments.rows_per_step)]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode:
                    sys.exit(run.stderr)
                results[kind].append(json.loads(run.stdout.splitlines()[-1]))
    report(results, rows_per_step=arguments.rows_per_step)


def report(results: dict[str, list[dict[str, Any]]], *, rows_per_step: int) -> None:
    """Print the table; fail if the trainers did not compute the same."""
    expected = results["trainer"][0]["losses"]
    difference = max(
        abs(loss - reference) / reference
        for runs in results.values()
        for run in runs
        for loss, reference in zip(run["losses"], expected, strict=True)
    )
    print(
        f"losses of the steps: {', '.join(f'{loss:.4f}' for loss in expected)}; largest difference {difference:.1e}\n"
    )
    if difference > 1e-3:
        sys.exit("the trainers compute different losses")
    print("| trainer | rows/s | against TRL as it comes | against Trainer | peak memory, MB |")
    print("|---|---|---|---|---|")
    rates = {
        kind: rows_per_step / min(statistics.mean(run["steps"]) for run in runs) for kind, runs in results.items()
    }
    for kind, rate in rates.items():
        peak = max(run["peak"] for run in results[kind]) / 1e6
        against = f"{rate / rates['trl']:.2f} | {rate / rates['trainer']:.2f}"
        print(f"| {TRAINERS[kind]} | {rate:.2f} | {against} | {peak:.0f} |")


if __name__ == "__main__":
    main()
