"""ChatCache: keys, values and image features that the next turn of a conversation can use, and the images of a prompt.

The keys and values form a tree: a segment holds those of a stretch of tokens, and is split in two where conversations
part (as in SGLang's RadixAttention, arXiv:2312.07104). So what conversations share is kept once, a branch never
destroys what another one needs, and a bound in bytes drops the stretch that was used least recently. The tower sees
an image once, however many prompts show it, as long as the cache keeps its features.

What is surprising: a token is known again by its id, but a token of an image by the digest of its image. Equal ids of
different pictures do not match.
"""

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import BatchFeature, PreTrainedModel, StaticCache

from modeling_llava.visual_tokens import check_image_tokens

TokenKey = int | bytes
DEFAULT_MAX_BYTES = 2 * 2**30


@dataclass(eq=False)
class _Segment:
    """Tokens that follow those of `parent`."""

    keys: list[TokenKey]
    parent: "_Segment | None" = None
    children: dict[TokenKey, "_Segment"] = field(default_factory=dict)
    """By their first key."""


class ChatCache:
    """What one model has computed for all its conversations.

    Args:
        max_bytes: Of all states and features kept between answers; those of the running answer come on top. One token
            of a 7B model takes 0.5 MB in 16 bits.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.lock = Lock()
        """Whoever calls `find_*` and `store_*` holds it, and so does every running answer."""
        self.static_caches: dict[int, StaticCache] = {}
        """Of compiled answers, by their length in tokens; beside `max_bytes`."""
        self.compiled_worker = ThreadPoolExecutor(1)
        """Where compiled answers are made: PyTorch keeps CUDA graphs for the thread that recorded them."""
        self._model: weakref.ref[nn.Module] | None = None
        self._root = _Segment([])
        self._kept: dict[_Segment | bytes, list[torch.Tensor]] = {}
        """States of segments and features of images, least recently used first; a segment before its parents."""

    def bind(self, model: nn.Module) -> None:
        """Belong to a model from now on.

        Raises:
            ValueError: if the cache belongs to another one.
        """
        if self._model is None:
            self._model = weakref.ref(model)
        if self._model() is not model:
            raise ValueError(
                "got a ChatCache that another model has used; expected one of its own for each model: make a new one"
            )

    def resize(self, max_bytes: int) -> None:
        """Keep at most so much from now on, or from the end of the running answer on."""
        self.max_bytes = max_bytes
        # A running answer drops what is too much when it stores its own states.
        if self.lock.acquire(blocking=False):
            self._evict()
            self.lock.release()

    def clear(self) -> None:
        """Drop everything, for example after the weights were changed; waits for the running answer."""
        with self.lock:
            self.num_bytes = 0
            self.static_caches.clear()
            self._root = _Segment([])
            self._kept = {}

    def find_prefix(self, keys: Sequence[TokenKey]) -> tuple[int, Iterator[torch.Tensor]]:
        """The states of the longest known beginning.

        Returns:
            Its length L and the tensors that were stored, `[1, heads, L, width]`, each copied when its turn comes; no
            tensors if L is 0.
        """
        path = self._find_path(keys)
        self._touch(path)
        parts = [[states[..., :count, :] for states in self._kept[segment]] for segment, count in path]
        return sum(count for _, count in path), (torch.cat(pieces, dim=-2) for pieces in zip(*parts))

    def store_prefix(self, keys: Sequence[TokenKey], states: list[torch.Tensor]) -> None:
        """Keep what is new in `states`, tensors `[1, heads, L, width]` for `keys` of length L.

        The list is emptied: if nothing else holds a tensor, its memory is free before the next one is copied. What
        alone is larger than `max_bytes` is not kept.
        """
        path = self._find_path(keys)
        length = sum(count for _, count in path)
        num_new_bytes = sum(tensor[..., length:, :].nbytes for tensor in states)
        if length < len(keys) and num_new_bytes <= self.max_bytes:
            new_states = []
            while states:
                new_states.append(_own(states.pop(0)[..., length:, :]))
            if path:
                path[-1] = (self._split(*path[-1]), path[-1][1])
            parent = path[-1][0] if path else self._root
            leaf = _Segment(list(keys[length:]), parent)
            parent.children[leaf.keys[0]] = leaf
            self._keep(leaf, new_states)
        self._touch(path)
        self._evict()

    def find_features(self, digest: bytes) -> torch.Tensor | None:
        """The features `[N, D]` of an image, if they are known."""
        if digest not in self._kept:
            return None
        self._kept[digest] = self._kept.pop(digest)
        return self._kept[digest][0]

    def store_features(self, digest: bytes, features: torch.Tensor) -> None:
        """Keep the features `[N, D]` of an image that has none here yet."""
        self._keep(digest, [_own(features)])
        self._evict()

    def _find_path(self, keys: Sequence[TokenKey]) -> list[tuple[_Segment, int]]:
        """Segments from the root on, each with the number of its tokens that match."""
        path, segment, position = [], self._root, 0
        while position < len(keys) and keys[position] in segment.children:
            segment = segment.children[keys[position]]
            pairs = zip(segment.keys, keys[position : position + len(segment.keys)])
            equal = [known == key for known, key in pairs]
            count = equal.index(False) if False in equal else len(equal)
            path.append((segment, count))
            position += count
            if count < len(segment.keys):
                break
        return path

    def _split(self, tail: _Segment, count: int) -> _Segment:
        """Put the first tokens of a segment into one of their own, which is returned."""
        if count == len(tail.keys):
            return tail
        head = _Segment(tail.keys[:count], tail.parent)
        head.parent.children[head.keys[0]] = head
        tail.keys, tail.parent = tail.keys[count:], head
        head.children[tail.keys[0]] = tail
        states = self._kept[tail]
        self._kept[tail] = [_own(tensor[..., count:, :]) for tensor in states]
        self._kept[head] = [_own(tensor[..., :count, :]) for tensor in states]
        return head

    def _touch(self, path: list[tuple[_Segment, int]]) -> None:
        for segment, _ in reversed(path):
            self._kept[segment] = self._kept.pop(segment)

    def _keep(self, item: _Segment | bytes, tensors: list[torch.Tensor]) -> None:
        self._kept[item] = tensors
        self.num_bytes += _count_bytes(tensors)

    def _evict(self) -> None:
        while self.num_bytes > self.max_bytes:
            item = next(iter(self._kept))
            self.num_bytes -= _count_bytes(self._kept.pop(item))
            if isinstance(item, _Segment):
                del item.parent.children[item.keys[0]]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own: a view would keep the whole tensor that it was cut from."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _count_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


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
    layouts = model.model.plan_images(pixel_values, image_sizes)
    counts = [layout.num_tokens for layout in layouts]
    check_image_tokens(image_mask_BL, counts, visual_tokens=model.config.visual_tokens)
    if pixel_values.ndim == 5:
        # The padding to the largest number of tiles depends on the other images.
        tiles = [image[: layout.num_tiles] for image, layout in zip(tiles, layouts)]
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
