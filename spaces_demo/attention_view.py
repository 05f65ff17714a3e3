"""Looked: where a model's attention was while it wrote an answer, as the page shows it."""

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.inference.attention_map import AnswerAttention, lay_on_picture, overlay
from processing_llava.processing_llava import AnyLlavaProcessor

from .conversation import open_picture

LAYERS = {"all": (0, 1), "first third": (0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1)}
"""Name to the range of layers, as shares of their number."""
LONGEST_SIDE = 768
"""Longer side, in pixels, of a picture that is shown."""


@dataclass(frozen=True)
class Looked:
    """Everything that it takes to show the attention, whatever becomes of the model."""

    attention: AnswerAttention
    config: AnyLlavaConfig
    processor: AnyLlavaProcessor
    """As it was set for the answer."""
    pictures: list[str]
    """Paths, in the order of the conversation."""

    def find_word(self) -> int:
        """The word that looks at the pictures most."""
        return max(range(len(self.attention.words)), key=lambda word: _add_up(self.attention.select(word)))

    def draw(self, *, word: int, layers: str) -> str:
        """HTML of the pictures as one word saw them.

        Raises:
            ValueError: if a picture was deleted.
        """
        num_layers = len(self.attention.weights[0])
        first, last = (round(share * num_layers) for share in LAYERS[layers])
        weights = self.attention.select(word, slice(first, max(last, first + 1)))
        # Twice, so that one picture is in memory at a time.
        highest = max(float(density.max()) for _, density in self._lay(weights))
        name = html.escape(self.attention.words[word])
        drawn = [f"<p><b>{name}</b>: {_add_up(weights):.0%} of the attention is on pictures.</p>"]
        for number, (picture, density) in enumerate(self._lay(weights), start=1):
            source = _encode(overlay(picture, density, highest=highest))
            drawn.append(f'<img alt="Where the model looked in picture {number} for the word {name}" src="{source}">')
        return "".join(drawn)

    def _lay(self, weights: list[torch.Tensor]) -> Iterator[tuple[Image.Image, np.ndarray]]:
        """Each picture, and the density of its weights."""
        for path, of_picture in zip(self.pictures, weights):
            picture = open_picture(path)
            yield picture, lay_on_picture(of_picture, picture, self.config, self.processor)


def _add_up(weights: list[torch.Tensor]) -> float:
    return sum(float(of_picture.sum()) for of_picture in weights)


def _encode(picture: Image.Image) -> str:
    """A data URI: nothing is left on the disk."""
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
