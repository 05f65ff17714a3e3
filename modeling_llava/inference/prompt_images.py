"""The images of prompts: which tokens are theirs, how equal ones are known again, and their features.

The tower sees an image once, however many prompts show it, as long as the cache keeps its features.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedModel

from .chat_cache import ChatCache


@dataclass(frozen=True)
class PromptImage:
    row: int
    """In `pixel_values`."""
    digest: bytes
    start: int
    """Its first token in the prompt."""
    num_tokens: int


def read_images(model: PreTrainedModel, inputs: BatchFeature, *, scope: bytes = b"") -> list[PromptImage]:
    """The images of a prompt, in reading order; digests of equal images differ between scopes.

    Raises:
        ValueError: if image tokens and images of the prompt do not match.
    """
    if "pixel_values" not in inputs:
        return []
    pixel_values, image_sizes = inputs["pixel_values"], inputs.get("image_sizes")
    image_mask_BL = inputs["input_ids"] == model.config.image_token_id
    tiles = list(pixel_values)
    if model.config.model_type == "any_llava":
        layouts = model.model.plan_images(pixel_values, image_sizes)
        counts = [layout.num_tokens for layout in layouts]
        model.model.check_image_tokens(image_mask_BL, counts)
        if pixel_values.ndim == 5:
            # The padding to the largest number of tiles depends on the other images.
            tiles = [image[: layout.num_tiles] for image, layout in zip(tiles, layouts)]
    else:
        counts = [int(image_mask_BL.sum()) // len(tiles)] * len(tiles)
    positions = image_mask_BL[0].nonzero()[:, 0].tolist()
    images, num_before = [], 0
    for row, (image, count) in enumerate(zip(tiles, counts)):
        size = None if image_sizes is None else image_sizes[row].tolist()
        digest = hashlib.sha256(scope + f"{tuple(image.shape)} {size} {count}".encode())
        digest.update(image.contiguous().view(torch.uint8).numpy())
        images.append(PromptImage(row, digest.digest(), positions[num_before], count))
        num_before += count
    return images


def load_features(
    model: PreTrainedModel, cache: ChatCache, images: list[tuple[PromptImage, BatchFeature]]
) -> list[torch.Tensor]:
    """Features `[N, D]` of images, each given with the inputs that hold its pixels; unknown ones are cached."""
    features = {image.digest: cache.find_features(image.digest) for image, _ in images}
    unknown = {image.digest: (image.row, inputs) for image, inputs in images if features[image.digest] is None}
    if unknown:
        pixels = [inputs["pixel_values"][row] for row, inputs in unknown.values()]
        batch = {}
        if pixels[0].ndim == 4:
            num_tiles = max(len(tiles) for tiles in pixels)
            pixels = [pad(tiles, (0, 0) * 3 + (0, num_tiles - len(tiles))) for tiles in pixels]
            batch["image_sizes"] = torch.stack([inputs["image_sizes"][row] for row, inputs in unknown.values()])
        batch["pixel_values"] = torch.stack(pixels).to(model.device)
        encoded = model.get_image_features(**batch, return_dict=True).pooler_output
        for digest, image_features in zip(unknown, encoded):
            features[digest] = image_features
            cache.store_features(digest, image_features)
    return [features[image.digest] for image, _ in images]
