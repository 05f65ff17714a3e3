"""Draw training pictures: emoji of several artists on made-up backgrounds, and patterns that show nothing.

Everything takes a `random.Random`, so that one seed gives the same bytes. Colours that questions ask about are
measured on the drawing itself (`find_main_color`), never taken from a table: each artist paints a different apple.
"""

import colorsys
import io
import math
import random
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from .concepts import FXEMOJI_SLUGS, ICON_MEANS_OTHER
from .packages import fetch_npm, read_icons

SIZE = 112
# fmt: off
TRAIN_ARTISTS = {
    "noto": "1.2.9", "openmoji": "1.2.29", "fluent-emoji-flat": "1.2.6", "fluent-emoji": "1.2.7", "emojione": "1.2.3",
    "fxemoji": "1.2.2", "streamline-emojis": "1.2.4",
}
# Icons of one or two colours: other artists' idea of what makes the shape of a thing.
ICON_ARTISTS = {"game-icons": "1.2.4", "icon-park": "1.2.4", "mdi": "1.2.3", "ph": "1.2.2", "fa7-solid": "1.2.5"}
HELDOUT_ARTISTS = {"twemoji": "1.2.5"}

BACKGROUNDS = {
    "white": (255, 255, 255), "black": (15, 15, 15), "gray": (128, 128, 128), "red": (220, 50, 40),
    "green": (60, 160, 70), "blue": (60, 100, 220), "yellow": (250, 220, 70), "orange": (245, 150, 45),
    "purple": (140, 80, 190), "pink": (250, 170, 200), "brown": (130, 85, 50),
}
# fmt: on


class Artist:
    """One package of drawings: answers which slugs it has and renders them with a transparent background."""

    def __init__(self, name: str, version: str, cache: Path) -> None:
        self.name = name
        files = fetch_npm(f"@iconify-json/{name}", version, cache)
        self.icons = read_icons(files)
        self.rendered: dict[str, Image.Image] = {}

    def find_icon(self, slug: str) -> str | None:
        """Return this package's own name for a slug, or None where it has no such drawing."""
        if self.name == "fxemoji":
            own = FXEMOJI_SLUGS.get(slug, slug.replace("-", ""))
            return own if own in self.icons else None
        if self.name in ICON_ARTISTS:
            return self._find_icon_of_set(slug)
        if slug in self.icons:
            return slug
        return f"{slug}-1" if self.name == "streamline-emojis" and f"{slug}-1" in self.icons else None

    def _find_icon_of_set(self, slug: str) -> str | None:
        if slug.replace("-", " ") in ICON_MEANS_OTHER.get(self.name, ()):
            return None
        # Phosphor draws every icon in several weights; "fill" is the one whose shape is seen at this size.
        names = [f"{slug}-fill"] if self.name == "ph" else [slug, slug.removesuffix("s")]
        return next((name for name in names if name in self.icons), None)

    def draw(self, slug: str) -> Image.Image:
        """Return the RGBA drawing of a slug that `find_icon` knows, cropped to what is painted."""
        if slug not in self.rendered:
            png = resvg_py.svg_to_bytes(
                svg_string=self.icons[self.find_icon(slug)], width=160, height=160, skip_system_fonts=True
            )
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            self.rendered[slug] = image.crop(image.getchannel("A").getbbox())
        return self.rendered[slug]


def name_color(red: int, green: int, blue: int) -> str:
    """Return the everyday name of one colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.24:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.85 else "gray"
    if (hue < 16 or hue >= 335) and value > 0.8 and saturation < 0.5 or 290 <= hue < 335 and value > 0.75:
        return "pink"
    if hue < 16 or hue >= 335:
        return "red" if value > 0.5 else "brown"
    if hue < 38:
        return "brown" if value < 0.72 else "orange"
    if hue < 70:
        return "yellow" if value > 0.6 else "brown"
    if hue < 165:
        return "green"
    return "blue" if hue < 255 else "purple"


def find_main_color(drawing: Image.Image) -> str | None:
    """Return the name of the colour that covers most of a drawing, or None where no colour clearly does."""
    pixels = np.asarray(drawing.resize((24, 24)))
    pixels = pixels[pixels[..., 3] > 200][:, :3]
    names: dict[str, int] = {}
    for red, green, blue in pixels.tolist():
        name = name_color(red, green, blue)
        names[name] = names.get(name, 0) + 1
    if not names:
        return None
    best = max(sorted(names), key=names.__getitem__)
    return best if names[best] > 0.65 * len(pixels) else None


def vary_drawing(drawing: Image.Image, rng: random.Random, *, side: int, flip: bool = True) -> Image.Image:
    """Return the drawing scaled so that its longer side is `side`, mirrored, turned and lit at random."""
    scale = side / max(drawing.size)
    stretch = rng.uniform(0.88, 1.12)
    width, height = max(8, int(drawing.width * scale * stretch)), max(8, int(drawing.height * scale / stretch))
    image = drawing.resize((width, height), Image.Resampling.LANCZOS)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        image = image.rotate(rng.uniform(-22, 22), Image.Resampling.BICUBIC, expand=True)
    alpha = image.getchannel("A")
    color = image.convert("RGB")
    color = ImageEnhance.Color(color).enhance(rng.uniform(0.6, 1.35))
    color = ImageEnhance.Brightness(color).enhance(rng.uniform(0.8, 1.15))
    color = ImageEnhance.Contrast(color).enhance(rng.uniform(0.8, 1.2))
    color.putalpha(alpha)
    return color


def shift_hue(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Return the drawing in other colours, so that a name is learned from the shape as well."""
    alpha = drawing.getchannel("A")
    hue, saturation, value = drawing.convert("RGB").convert("HSV").split()
    turn = rng.randrange(20, 236)
    shifted = Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")
    shifted.putalpha(alpha)
    return shifted


def tint_icon(icon: Image.Image, rng: random.Random) -> Image.Image:
    """Return a one-coloured icon in a random dark or vivid colour."""
    color = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 1.0), rng.choice((0.1, 0.5, 0.7, 0.9)))
    tinted = Image.new("RGB", icon.size, tuple(int(255 * level) for level in color))
    tinted.putalpha(icon.getchannel("A"))
    return tinted


def paint_background(rng: random.Random, photos: list[Image.Image]) -> tuple[Image.Image, str | None]:
    """Return a background and, where it is one plain colour, the name of that colour."""
    kind = rng.random()
    if kind < 0.30:
        return Image.new("RGB", (SIZE, SIZE), (255, 255, 255)), "white"
    if kind < 0.55:
        name = rng.choice(sorted(BACKGROUNDS))
        color = tuple(min(255, max(0, level + rng.randint(-12, 12))) for level in BACKGROUNDS[name])
        return Image.new("RGB", (SIZE, SIZE), color), name
    if kind < 0.70:
        return Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(170, 255) for _ in range(3))), None
    if kind < 0.85:
        return paint_gradient(rng), None
    photo = rng.choice(photos)
    side = rng.randint(60, min(photo.size))
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return crop.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))), None


def paint_gradient(rng: random.Random) -> Image.Image:
    """Return a smooth change between two colours in a random direction."""
    first, second = (np.array([rng.randint(0, 255) for _ in range(3)]) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    weight = np.clip(rows * math.sin(angle) + columns * math.cos(angle) + 0.5, 0, 1)[..., None]
    return Image.fromarray((first * (1 - weight) + second * weight).astype(np.uint8))


def paint_pattern(rng: random.Random) -> Image.Image:
    """Return a picture of nothing in particular: noise, blots, stripes or scribbles."""
    kind = rng.randrange(4)
    noise = np.random.default_rng(rng.randrange(2**32))
    if kind == 0:
        return Image.fromarray(noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    if kind == 1:
        blots = noise.integers(0, 256, (rng.randint(3, 9),) * 2 + (3,), dtype=np.uint8)
        return Image.fromarray(blots).resize((SIZE, SIZE), rng.choice([0, 3]))
    image = paint_gradient(rng)
    pen = ImageDraw.Draw(image)
    if kind == 2:
        step, slant = rng.randint(6, 24), rng.randint(-40, 40)
        color = tuple(rng.randint(0, 255) for _ in range(3))
        for left in range(-60, SIZE + 60, step):
            pen.line([(left, 0), (left + slant, SIZE)], fill=color, width=step // 2)
        return image
    for _ in range(rng.randint(4, 20)):
        points = [(rng.randint(0, SIZE), rng.randint(0, SIZE)) for _ in range(rng.randint(2, 5))]
        pen.line(points, fill=tuple(rng.randint(0, 255) for _ in range(3)), width=rng.randint(1, 6))
    return image


def crop_photo(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Return a random part of a photograph, turned and with its colours exchanged at random."""
    side = rng.randint(min(photo.size) // 3, min(photo.size))
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    crop = Image.merge("RGB", rng.sample(crop.split(), 3)).transpose(rng.choice(list(Image.Transpose)))
    return ImageEnhance.Brightness(crop).enhance(rng.uniform(0.6, 1.4))


def paste(background: Image.Image, drawing: Image.Image, *, center: tuple[int, int]) -> None:
    """Paint the drawing onto the background in place."""
    background.paste(drawing, (center[0] - drawing.width // 2, center[1] - drawing.height // 2), drawing)


def encode_jpeg(image: Image.Image) -> bytes:
    """Return the JPEG bytes of a picture at a quality that leaves drawings clean."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
