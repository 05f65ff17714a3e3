"""Compose the rows of pictures that others took or drew whole: photographs of clothing, and Easy-VQA.

Training sees turned, cropped and relit variants; what measures is shown as it is.
"""

import io
import json
import random
import zipfile
from pathlib import Path

from PIL import Image, ImageEnhance

from .concepts import CLOTHING_CLASSES
from .drawings import SIZE, encode_jpeg
from .heldout import make_row
from .questions import Turn, ask_category, ask_choice, ask_name, ask_presence
from .scenes import NAMES, Row, render_turns

EASY_VQA_VARIANTS, EASY_VQA_TURNS = 3, 8
CLOTHING_VARIANTS = 6


def read_photos(wheel: zipfile.ZipFile, names: tuple[str, ...]) -> list[Image.Image]:
    """Return photographs of scikit-image at 224 px."""
    images = [Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}"))).convert("RGB") for name in names]
    return [image.resize((224, 224), Image.Resampling.LANCZOS) for image in images]


def write_easy_vqa(wheel: zipfile.ZipFile, split: str, out: Path, rng: random.Random) -> list[Row]:
    """Return Easy-VQA rows: turned variants with several questions for training, one question a row for the test."""
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, index in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json")):
        questions.setdefault(index, []).append((question, answer))
    rows = []
    for index, turns in questions.items():
        data = wheel.read(f"easy_vqa/data/{split}/images/{index}.png")
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for variant in range(EASY_VQA_VARIANTS if split == "train" else 1):
            path = f"images/easy-vqa-{split}-{index}-{variant}.jpg"
            turned = image if variant == 0 else image.transpose(rng.choice(list(Image.Transpose)))
            (out / path).write_bytes(encode_jpeg(turned))
            row_id = path.removeprefix("images/").removesuffix(".jpg")
            if split == "train":
                chosen = rng.sample(turns, min(EASY_VQA_TURNS, len(turns)))
                rows.append({"id": row_id, "image": path, "conversations": render_turns(chosen)})
            else:
                rows += [make_row(f"{row_id}-{number}", path, "easy_vqa", turn) for number, turn in enumerate(turns)]
    return rows


def pad_photo(photo: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return the photo whole, centred on a square of the tower's size."""
    photo = photo.copy()
    photo.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), color)
    square.paste(photo, ((SIZE - photo.width) // 2, (SIZE - photo.height) // 2))
    return square


def vary_photo(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Return the photo padded, stretched or cropped to a square, mirrored and lit at random."""
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    photo = photo.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(123, 117, 104))
    width, height = (int(length * rng.uniform(0.8, 1.0)) for length in photo.size)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    photo = photo.crop((left, top, left + width, top + height))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        photo = enhance(photo).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.5:
        return photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return pad_photo(photo, rng.choice(((123, 117, 104), (255, 255, 255), (0, 0, 0))))


def list_clothing(folder: Path, split: str) -> list[tuple[str, Path]]:
    """Return the name and the path of every photograph of a split, in a fixed order."""
    paths = [(name, path) for label, name in CLOTHING_CLASSES.items() for path in (folder / split / label).iterdir()]
    if not paths:
        raise ValueError(f"got no photographs in {folder / split}; expected class folders; check --clothing")
    return sorted(paths, key=lambda pair: str(pair[1]))


def write_clothing(folder: Path, out: Path, rng: random.Random) -> list[Row]:
    """Return training rows of the clothing photographs, those of the validation split included: nothing is tuned."""
    names = sorted(set(CLOTHING_CLASSES.values()))
    rows = []
    for number, (name, path) in enumerate(list_clothing(folder, "train") + list_clothing(folder, "validation")):
        photo = Image.open(path).convert("RGB")
        for variant in range(CLOTHING_VARIANTS):
            row_id = f"clothing-{number}-{variant}"
            (out / f"images/{row_id}.jpg").write_bytes(encode_jpeg(vary_photo(photo, rng)))
            conversations = plan_clothing(name, names, rng)
            rows += [
                {"id": f"{row_id}-{index}", "image": f"images/{row_id}.jpg", "conversations": render_turns(turns)}
                for index, turns in enumerate(conversations)
            ]
    return rows


def plan_clothing(name: str, names: list[str], rng: random.Random) -> list[list[Turn]]:
    """Return conversations about a photograph of a piece of clothing; see `plan_conversations`."""
    others = [other for other in names if other != name]
    strangers = rng.sample([other for other in NAMES if other not in names], len(others))
    answers = [rng.choice(("yes", "no")) for _ in range(2)]
    presence = [
        ask_presence(name if answer == "yes" else rng.choice(others + others + strangers), answer, rng)
        for answer in answers
    ]
    choice = ask_choice(name, rng.sample(others, rng.randint(1, 3)), rng)
    category = ask_category("piece of clothing", rng)
    naming = [ask_name(name, rng), *rng.sample([category, choice], rng.randint(0, 1))]
    return [naming, rng.sample([*presence, choice], len(presence) + 1)]
