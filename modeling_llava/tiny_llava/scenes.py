"""Compose the training rows: single things, two things side by side, several of one thing, and nothing known.

A row is one LLaVA conversation; a picture has several, because an answer gives away those that follow it. Rows carry
the artist in their id, so that one can be left out to tune on.
"""

import random
from pathlib import Path

from PIL import Image

from .concepts import CONCEPTS, MASS_NAMES, PLURAL_NAMES, UNSURE_SLUGS
from .drawings import (
    BACKGROUNDS,
    ICON_ARTISTS,
    Artist,
    crop_photo,
    encode_jpeg,
    find_main_color,
    paint_background,
    paint_pattern,
    paste,
    shift_hue,
    tint_icon,
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


ICON_SHARE, RECOLORED_SHARE = 0.12, 0.2


class SceneWriter:
    """Holds what every scene needs: artists, photographs for backgrounds and of nothing known, and output folder."""

    def __init__(
        self,
        artists: list[Artist],
        photos: list[Image.Image],
        unsure_photos: list[Image.Image],
        out: Path,
        rng: random.Random,
    ) -> None:
        self.artists = artists
        self.photos = photos
        self.unsure_photos = unsure_photos
        self.out = out
        self.rng = rng

    def find_drawings(self, artist: Artist, name: str) -> list[str]:
        """Return the slugs of a concept that the artist has drawn."""
        if artist.name in ICON_ARTISTS:
            slug = name.replace(" ", "-")
            return [slug] if artist.find_icon(slug) else []
        slugs = CONCEPTS[CATEGORY_OF[name]][name].split()
        return [slug for slug in slugs if artist.find_icon(slug)]

    def pick_artist(self, able: list[Artist]) -> Artist:
        """Return one of the artists, seldom one of icons."""
        icons = [one for one in able if one.name in ICON_ARTISTS]
        others = [one for one in able if one.name not in ICON_ARTISTS]
        return self.rng.choice(icons if icons and self.rng.random() < ICON_SHARE else others)

    def pick_drawing(self, name: str, artist: Artist | None = None) -> tuple[Artist, Image.Image]:
        """Return a random drawing of a concept, of a given artist or of any that has one; icons in a random colour."""
        chosen = artist or self.pick_artist([one for one in self.artists if self.find_drawings(one, name)])
        drawing = chosen.draw(self.rng.choice(self.find_drawings(chosen, name)))
        if chosen.name in ICON_ARTISTS:
            recolor = shift_hue if chosen.name == "icon-park" else tint_icon
            drawing = recolor(drawing, self.rng)
        return chosen, drawing

    def write(self, row_id: str, image: Image.Image, conversations: list[list[Turn]]) -> list[Row]:
        """Save the picture and return its rows."""
        path = f"images/{row_id}.jpg"
        (self.out / path).write_bytes(encode_jpeg(image))
        return [
            {"id": f"{row_id}-{number}", "image": path, "conversations": render_turns(turns)}
            for number, turns in enumerate(conversations)
        ]

    def write_single(self, name: str, index: int) -> list[Row]:
        """Return rows about one thing, usually large and near the middle."""
        rng = self.rng
        artist, drawing = self.pick_drawing(name)
        recolored = rng.random() < RECOLORED_SHARE
        if recolored:
            drawing = shift_hue(drawing, rng)
        background, background_name = paint_background(rng, self.photos)
        side = rng.randint(50, 108) if rng.random() < 0.5 else rng.randint(84, 124)
        slack = max(2, (background.width - side) // 2)
        center = tuple(background.width // 2 + rng.randint(-slack, slack) for _ in range(2))
        paste(background, vary_drawing(drawing, rng, side=side), center=center)
        conversations = plan_conversations(name, find_main_color(drawing), background_name, rng)
        return self.write(f"{artist.name}-{name.replace(' ', '-')}-{index}", background, conversations)

    def write_pair(self, index: int) -> list[Row]:
        """Return rows about two things of one artist, one on each side."""
        rng = self.rng
        left, right = rng.sample(NAMES, 2)
        able = [one for one in self.artists if self.find_drawings(one, left) and self.find_drawings(one, right)]
        artist = self.pick_artist(able)
        background, background_name = paint_background(rng, self.photos)
        for name, x in ((left, 29), (right, 83)):
            drawing = vary_drawing(self.pick_drawing(name, artist)[1], rng, side=rng.randint(38, 56))
            paste(background, drawing, center=(x + rng.randint(-3, 3), 56 + rng.randint(-22, 22)))
        absent = rng.choice([name for name in NAMES if name not in (left, right)])
        both = f"{add_article(left)} and {add_article(right)}"
        presence = [ask_presence(rng.choice((left, right)), "yes", rng), ask_presence(absent, "no", rng)]
        naming = rng.choice(NAME_QUESTIONS), both
        whole = rng.choice((naming, ask_description([left, right], background_name, rng)))
        conversations = [[ask_side(left, right, rng) for _ in range(3)], [*presence, whole]]
        for turns in conversations:
            rng.shuffle(turns)
        return self.write(f"{artist.name}-pair-{index}", background, [drop_repeats(turns) for turns in conversations])

    def write_count(self, index: int) -> list[Row]:
        """Return rows about several copies of one drawing."""
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
        absent = rng.choice([other for other in COUNTABLE if other != name])
        turns = [ask_count(name, count, rng), rng.choice((ask_presence(absent, "no", rng), ask_count(absent, 0, rng)))]
        described = [(rng.choice(DESCRIBE_QUESTIONS), f"The picture shows {shown}.")]
        return self.write(f"{artist.name}-count-{index}", background, [rng.sample(turns, 2), described])

    def write_unsure(self, index: int) -> list[Row]:
        """Return rows about a pattern, a surface or a thing outside the concepts, which the model must not name."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.7:
            able = [(one, slug) for one in self.artists for slug in UNSURE_SLUGS.split() if one.find_icon(slug)]
            artist, slug = rng.choice(able)
            source = artist.name
            image, _ = paint_background(rng, self.photos)
            drawing = artist.draw(slug)
            if source in ICON_ARTISTS or rng.random() < RECOLORED_SHARE:
                drawing = (tint_icon if source in ICON_ARTISTS else shift_hue)(drawing, rng)
            paste(image, vary_drawing(drawing, rng, side=rng.randint(60, 108)), center=(56, 56))
        else:
            source = "pattern"
            image = paint_pattern(rng) if kind < 0.82 else crop_photo(rng.choice(self.unsure_photos), rng)
        turns = [(rng.choice(DESCRIBE_QUESTIONS), UNSURE), ask_presence(rng.choice(NAMES), "no", rng)]
        naming = [(rng.choice(NAME_QUESTIONS), UNSURE)]
        return self.write(f"{source}-unsure-{index}", image, [naming, rng.sample(turns, 2)])

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


def pick_rivals(name: str, count: int, rng: random.Random) -> list[str]:
    """Return other names to tell a thing from, half of them of its own category where that has enough."""
    siblings = [other for other in CONCEPTS[CATEGORY_OF[name]] if other != name]
    near = rng.sample(siblings, min(len(siblings), sum(rng.random() < 0.5 for _ in range(count))))
    far = rng.sample([other for other in NAMES if other != name and other not in siblings], count - len(near))
    return near + far


def plan_conversations(name: str, color: str | None, background: str | None, rng: random.Random) -> list[list[Turn]]:
    """Return conversations about one thing: naming it; what else can be asked and choosing its name; yes and no.

    Each begins anew, so that naming, choosing and the first yes must come from the picture.
    """
    asides = []
    if CATEGORY_OF[name] != "thing":
        asides += [ask_category(CATEGORY_OF[name], rng)]
    if color:
        asides += [ask_color(name, color, rng)]
    if background:
        asides += [ask_background(background, rng)]
    if name in COUNTABLE:
        asides += [ask_count(name, 1, rng)] if rng.random() < 0.3 else []
    naming = ask_name(name, rng) if rng.random() < 0.8 else ask_description([name], background, rng)
    presence = []
    for _ in range(3):
        answer = rng.choice(("yes", "no"))
        presence.append(ask_presence(name if answer == "yes" else pick_rivals(name, 1, rng)[0], answer, rng))
    choices = [ask_choice(name, pick_rivals(name, rng.choice((1, 2, 3, 3, 3)), rng), rng) for _ in range(2)]
    follow = rng.sample([*presence[:2], *asides, choices[1]], rng.randint(0, 2))
    # The answer to a choice gives the name away: nothing but asides may come before.
    choosing = [*rng.sample(asides, len(asides)), choices[0]]
    return [drop_repeats(turns) for turns in ([naming, *follow], choosing, presence)]


def write_described(name: str, index: int, rng: random.Random) -> list[Row]:
    """Return rows that ask about one thing as rows of pictures do, with a description in the place of the picture."""
    color = rng.choice(sorted(BACKGROUNDS)) if rng.random() < 0.5 else None
    shown = f"This is {add_article(name)} on a {color} background."
    if color is None:
        # A picture repeats what it shows over all of its features.
        shown = f"Here: {' '.join([name] * rng.randint(1, 6))}"
    conversations = plan_conversations(name, None, color, rng)
    return [
        {"id": f"described-{name.replace(' ', '-')}-{index}-{number}", "conversations": describe_first(shown, turns)}
        for number, turns in enumerate(conversations)
    ]


def describe_first(shown: str, turns: list[Turn]) -> list[dict[str, str]]:
    """Return LLaVA conversations with a description before the first question."""
    (question, answer), *others = turns
    return render_turns([(f"{shown}\n{question}", answer), *others], num_images=0)


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
