"""Compose the rows that measure the tiny LLaVA: drawings of an artist it never saw, and official test splits.

A row has the fields of a training row, one turn, and "task" and "answer" for scoring by string comparison. Wordings
come from the same lists as in training; pictures do not.
"""

import random
from pathlib import Path

from PIL import Image

from .concepts import CONCEPTS, NEW_CONCEPTS, UNSURE_HELDOUT_SLUGS
from .drawings import BACKGROUNDS, SIZE, Artist, encode_jpeg, find_main_color, paste
from .questions import (
    CATEGORY_OF,
    CATEGORY_QUESTIONS,
    NAME_QUESTIONS,
    UNSURE,
    Turn,
    add_article,
    ask_choice,
    ask_color,
    ask_count,
    ask_name,
    ask_presence,
    ask_side,
    join_options,
    name_category,
)
from .scenes import COUNTABLE, NAMES, Row, render_turns

NUM_SCENES = 200


def show_drawing(drawing: Image.Image, color: tuple[int, int, int], side: int = 92) -> Image.Image:
    """Return the drawing upright in the middle of a plain background."""
    image = Image.new("RGB", (SIZE, SIZE), color)
    paste(image, scale_drawing(drawing, side), center=(SIZE // 2, SIZE // 2))
    return image


def scale_drawing(drawing: Image.Image, side: int) -> Image.Image:
    """Return the drawing with its longer side of the given length."""
    scale = side / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    return drawing.resize(size, Image.Resampling.LANCZOS)


def make_row(row_id: str, image: str, task: str, turn: Turn) -> Row:
    """Return a held-out row."""
    return {"id": row_id, "image": image, "conversations": render_turns([turn]), "task": task, "answer": turn[1]}


def write_concept_rows(artist: Artist, out: Path, rng: random.Random) -> list[Row]:
    """Return name, choice, presence, category and colour rows of every trained concept, on two backgrounds each."""
    rows = []
    colors = [BACKGROUNDS[name] for name in sorted(BACKGROUNDS) if name != "white"]
    for name in NAMES:
        category = CATEGORY_OF[name]
        for slug in filter(artist.find_icon, CONCEPTS[category][name].split()):
            drawing = artist.draw(slug)
            for place, color in enumerate([(255, 255, 255), rng.choice(colors)]):
                key = f"heldout-{slug}-{place}"
                path = f"images/{key}.jpg"
                image = show_drawing(drawing, color, side=rng.randint(72, 104))
                (out / path).write_bytes(encode_jpeg(image))
                others = rng.sample([other for other in NAMES if other != name], 4)
                turns = {"name": ask_name(name, rng), "choice": ask_choice(name, others[:3], rng)}
                asked, answer = ((name, "yes"), (others[3], "no"))[(len(rows) + place) % 2]
                turns["presence"] = ask_presence(asked, answer, rng)
                if category != "thing" and place == 0:
                    turns["category"] = rng.choice(CATEGORY_QUESTIONS), name_category(category)
                main_color = find_main_color(drawing)
                if main_color and place == 0:
                    turns["color"] = ask_color(name, main_color, rng)
                rows += [make_row(f"{key}-{task}", path, task, turn) for task, turn in turns.items()]
    return rows


def write_new_rows(artist: Artist, out: Path, rng: random.Random) -> list[Row]:
    """Return either-or rows about the category of things that were never drawn for training."""
    rows = []
    for category, slugs in NEW_CONCEPTS.items():
        rivals = [other for other in ("animal", "food", "vehicle", "building", "plant") if other != category]
        rivals = [other for other in rivals if not (category == "fruit" and other == "food")]
        for slug in slugs.split():
            path = f"images/heldout-{slug}.jpg"
            (out / path).write_bytes(encode_jpeg(show_drawing(artist.draw(slug), (255, 255, 255))))
            options = rng.sample([name_category(category), name_category(rng.choice(rivals))], 2)
            turn = f"Is it {join_options(options)}?", name_category(category)
            rows.append(make_row(f"heldout-{slug}-category", path, "new_concept_category", turn))
    return rows


def write_scene_rows(artist: Artist, out: Path, rng: random.Random) -> list[Row]:
    """Return rows about which of two things is on which side, and rows about how many there are."""
    drawings = {
        name: artist.draw(next(filter(artist.find_icon, CONCEPTS[CATEGORY_OF[name]][name].split()))) for name in NAMES
    }
    rows = []
    for index in range(NUM_SCENES):
        left, right = rng.sample(NAMES, 2)
        image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        for name, x in ((left, 29), (right, 83)):
            paste(image, scale_drawing(drawings[name], 48), center=(x, SIZE // 2))
        path = f"images/heldout-side-{index}.jpg"
        (out / path).write_bytes(encode_jpeg(image))
        rows.append(make_row(f"heldout-side-{index}", path, "side", ask_side(left, right, rng)))

        name, count = rng.choice(COUNTABLE), 1 + index % 5
        image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        for x, y in rng.sample([(x, y) for x in (20, 56, 92) for y in (20, 56, 92)], count):
            paste(image, scale_drawing(drawings[name], 32), center=(x, y))
        path = f"images/heldout-count-{index}.jpg"
        (out / path).write_bytes(encode_jpeg(image))
        rows.append(make_row(f"heldout-count-{index}", path, "count", ask_count(name, count, rng)))
    return rows


def write_unsure_rows(artist: Artist, photos: list[Image.Image], out: Path, rng: random.Random) -> list[Row]:
    """Return rows about drawings and photographs that are far from every concept."""
    images = [show_drawing(artist.draw(slug), (255, 255, 255)) for slug in UNSURE_HELDOUT_SLUGS.split()]
    images += [photo.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for photo in photos]
    rows = []
    for index, image in enumerate(images):
        path = f"images/heldout-unsure-{index}.jpg"
        (out / path).write_bytes(encode_jpeg(image))
        rows.append(make_row(f"heldout-unsure-{index}", path, "unknown", (rng.choice(NAME_QUESTIONS), UNSURE)))
    return rows


def write_clothing_rows(photos: list[tuple[str, Image.Image]], out: Path, rng: random.Random) -> list[Row]:
    """Return one name row for each test photograph of a piece of clothing."""
    rows = []
    for index, (name, photo) in enumerate(photos):
        path = f"images/heldout-clothing-{index}.jpg"
        (out / path).write_bytes(encode_jpeg(photo))
        turn = rng.choice(NAME_QUESTIONS), add_article(name)
        rows.append(make_row(f"heldout-clothing-{index}", path, "clothing", turn))
    return rows
