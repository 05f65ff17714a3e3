"""Compose the training rows: single things, two things side by side, several of one thing, and nothing known.

A row is one LLaVA conversation. Rows of emoji carry the artist in their id, so that one can be left out to tune on.
"""

import random
from pathlib import Path

from PIL import Image

from .concepts import CONCEPTS, MASS_NAMES, PLURAL_NAMES, UNSURE_SLUGS
from .drawings import (
    Artist,
    encode_jpeg,
    find_main_color,
    paint_background,
    paint_pattern,
    paste,
    shift_hue,
    vary_drawing,
)
from .questions import (
    CATEGORY_OF,
    DESCRIBE_QUESTIONS,
    NAME_QUESTIONS,
    NUMBERS,
    UNSURE,
    Turn,
    add_article,
    ask_background,
    ask_category,
    ask_choice,
    ask_color,
    ask_count,
    ask_description,
    ask_name,
    ask_presence,
    ask_side,
    pluralize,
)

Row = dict[str, object]
NAMES = sorted(name for names in CONCEPTS.values() for name in names)
COUNTABLE = [name for name in NAMES if name not in MASS_NAMES | PLURAL_NAMES]


class SceneWriter:
    """Holds what every scene needs: the artists, the photographs for backgrounds and the output folder."""

    def __init__(self, artists: list[Artist], photos: list[Image.Image], out: Path, rng: random.Random) -> None:
        self.artists = artists
        self.photos = photos
        self.out = out
        self.rng = rng

    def find_drawings(self, artist: Artist, name: str) -> list[str]:
        """Return the slugs of a concept that the artist has drawn."""
        slugs = CONCEPTS[CATEGORY_OF[name]][name].split()
        return [slug for slug in slugs if artist.find_icon(slug)]

    def pick_drawing(self, name: str, artist: Artist | None = None) -> tuple[Artist, Image.Image]:
        """Return a random drawing of a concept, of a given artist or of any that has one."""
        able = [one for one in ([artist] if artist else self.artists) if self.find_drawings(one, name)]
        chosen = self.rng.choice(able)
        return chosen, chosen.draw(self.rng.choice(self.find_drawings(chosen, name)))

    def write(self, row_id: str, image: Image.Image, turns: list[Turn]) -> Row:
        """Save the picture and return its row."""
        path = f"images/{row_id}.jpg"
        (self.out / path).write_bytes(encode_jpeg(image))
        return {"id": row_id, "image": path, "conversations": render_turns(turns)}

    def write_single(self, name: str, index: int) -> Row:
        """Return a row about one thing, usually large and near the middle."""
        rng = self.rng
        artist, drawing = self.pick_drawing(name)
        recolored = rng.random() < 0.15
        if recolored:
            drawing = shift_hue(drawing, rng)
        background, background_name = paint_background(rng, self.photos)
        side = rng.randint(50, 108) if rng.random() < 0.7 else rng.randint(84, 124)
        slack = max(2, (background.width - side) // 2)
        center = tuple(background.width // 2 + rng.randint(-slack, slack) for _ in range(2))
        paste(background, vary_drawing(drawing, rng, side=side), center=center)
        color = None if recolored else find_main_color(drawing)
        turns = plan_single_turns(name, color, background_name, rng)
        return self.write(f"{artist.name}-{name.replace(' ', '-')}-{index}", background, turns)

    def write_pair(self, index: int) -> Row:
        """Return a row about two things of one artist, one on each side."""
        rng = self.rng
        left, right = rng.sample(NAMES, 2)
        able = [one for one in self.artists if self.find_drawings(one, left) and self.find_drawings(one, right)]
        artist = rng.choice(able)
        background, background_name = paint_background(rng, self.photos)
        for name, x in ((left, 29), (right, 83)):
            drawing = vary_drawing(self.pick_drawing(name, artist)[1], rng, side=rng.randint(38, 56))
            paste(background, drawing, center=(x + rng.randint(-3, 3), 56 + rng.randint(-22, 22)))
        absent = rng.choice([name for name in NAMES if name not in (left, right)])
        both = f"{add_article(left)} and {add_article(right)}"
        turns = [ask_side(left, right, rng), ask_side(left, right, rng)]
        turns += [ask_presence(rng.choice((left, right)), "yes", rng), ask_presence(absent, "no", rng)]
        naming = rng.choice(NAME_QUESTIONS), both
        turns.append(rng.choice((naming, ask_description([left, right], background_name, rng))))
        rng.shuffle(turns)
        return self.write(f"{artist.name}-pair-{index}", background, drop_repeats(turns)[:4])

    def write_count(self, index: int) -> Row:
        """Return a row about several copies of one drawing."""
        rng = self.rng
        name = rng.choice(COUNTABLE)
        artist, drawing = self.pick_drawing(name)
        count = rng.randint(1, 5)
        background, _ = paint_background(rng, self.photos)
        cells = rng.sample([(x, y) for x in (20, 56, 92) for y in (20, 56, 92)], count)
        side = rng.randint(26, 37)
        for x, y in cells:
            center = (x + rng.randint(-3, 3), y + rng.randint(-3, 3))
            paste(background, vary_drawing(drawing, rng, side=side), center=center)
        shown = add_article(name) if count == 1 else f"{NUMBERS[count]} {pluralize(name)}"
        turns = [ask_count(name, count, rng), (rng.choice(DESCRIBE_QUESTIONS), f"The picture shows {shown}.")]
        absent = rng.choice([other for other in COUNTABLE if other != name])
        turns.append(rng.choice((ask_presence(absent, "no", rng), ask_count(absent, 0, rng))))
        rng.shuffle(turns)
        return self.write(f"{artist.name}-count-{index}", background, turns[: rng.randint(2, 3)])

    def write_unsure(self, index: int) -> Row:
        """Return a row about a pattern or a thing outside the concepts, which the model must not name."""
        rng = self.rng
        source = "pattern"
        image = paint_pattern(rng)
        if rng.random() < 0.7:
            able = [(one, slug) for one in self.artists for slug in UNSURE_SLUGS.split() if one.find_icon(slug)]
            artist, slug = rng.choice(able)
            source = artist.name
            image, _ = paint_background(rng, self.photos)
            paste(image, vary_drawing(artist.draw(slug), rng, side=rng.randint(60, 108)), center=(56, 56))
        turns = [(rng.choice(NAME_QUESTIONS + DESCRIBE_QUESTIONS), UNSURE), ask_presence(rng.choice(NAMES), "no", rng)]
        rng.shuffle(turns)
        return self.write(f"{source}-unsure-{index}", image, turns)

    def write_two_images(self, index: int) -> Row:
        """Return a row with two pictures and a question that names one of them."""
        rng = self.rng
        names = rng.sample(NAMES, 2)
        paths = []
        for place, name in enumerate(names):
            image, _ = paint_background(rng, self.photos)
            paste(image, vary_drawing(self.pick_drawing(name)[1], rng, side=rng.randint(70, 104)), center=(56, 56))
            paths.append(f"images/two-{index}-{place}.jpg")
            (self.out / paths[-1]).write_bytes(encode_jpeg(image))
        order = rng.sample(((0, "first"), (1, "second")), 2)
        turns = [(f"What is in the {word} picture?", add_article(names[place])) for place, word in order]
        return {"id": f"two-{index}", "image": paths, "conversations": render_turns(turns, num_images=2)}


def plan_single_turns(name: str, color: str | None, background: str | None, rng: random.Random) -> list[Turn]:
    """Return two to four turns about one thing in random order, the name nearly always among them."""
    category = CATEGORY_OF[name]
    siblings = [other for other in CONCEPTS[category] if other != name]
    others = [other for other in NAMES if other != name]
    absent = rng.choice(siblings) if rng.random() < 0.3 else rng.choice(others)
    turns = [
        ask_choice(name, rng.sample(others, rng.choice((1, 2, 3, 3))), rng),
        ask_presence(name, "yes", rng),
        ask_presence(absent, "no", rng),
    ]
    if category != "thing":
        turns.append(ask_category(category, rng))
    if color:
        turns.append(ask_color(name, color, rng))
    if background:
        turns += [ask_background(background, rng)]
    if name in COUNTABLE and rng.random() < 0.3:
        turns.append(ask_count(name, 1, rng))
    naming = ask_name(name, rng) if rng.random() < 0.75 else ask_description([name], background, rng)
    chosen = [naming, *rng.sample(turns, rng.randint(1, 3))]
    rng.shuffle(chosen)
    return chosen


def drop_repeats(turns: list[Turn]) -> list[Turn]:
    """Return the turns without a question that was asked before."""
    return list(dict(turns).items())


def render_turns(turns: list[Turn], num_images: int = 1) -> list[dict[str, str]]:
    """Return LLaVA conversations, with the image tokens at the start of the first question."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        prefix = "<image>\n" * num_images if index == 0 else ""
        messages += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return messages
