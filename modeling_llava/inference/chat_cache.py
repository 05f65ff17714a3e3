"""ChatCache: the KV cache and image features that the next turn of a conversation can use, and the images of a prompt.

Keys and values form a radix tree: a segment holds those of some consecutive tokens, and is split in two where
conversations part (as in SGLang's RadixAttention, arXiv:2312.07104). So a shared beginning is kept once, and a branch
never overwrites what another one needs. A bound in bytes drops the segment that was used least recently. The vision
tower encodes an image once, however many prompts show it, as long as the cache keeps its features.

What is surprising: the tree's key of a text token is its id, but that of an image token is the digest of its image.
Equal ids of different pictures do not match.
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
"""The id of a text token, or the digest of the image of an image token."""
DEFAULT_MAX_BYTES = 2 * 2**30


@dataclass(eq=False)
class _Segment:
    """Consecutive tokens, which follow those of `parent`."""

    keys: list[TokenKey]
    parent: "_Segment | None" = None
    children: dict[TokenKey, "_Segment"] = field(default_factory=dict)
    """Segments that follow, by their first key."""


class ChatCache:
    """KV cache and image features of one model, for all its conversations.

    Args:
        max_bytes: Largest size of all that is kept between answers; the KV cache of the running answer comes on top.
            One token of a 7B model takes 0.5 MB in 16 bits.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.lock = Lock()
        """Callers of `find_*` and `store_*` hold it, and so does every running answer."""
        self.static_caches: dict[int, StaticCache] = {}
        """KV caches of compiled answers, by their length in tokens; they do not count in `num_bytes`."""
        self.compiled_worker = ThreadPoolExecutor(1)
        """The thread of compiled answers: PyTorch keeps CUDA graphs for the thread that recorded them (torch 2.13,
        _inductor/cudagraph_trees.py)."""
        self._model: weakref.ref[nn.Module] | None = None
        self._root = _Segment([])
        self._kept: dict[_Segment | bytes, list[torch.Tensor]] = {}
        """Keys and values of segments, and features of images, least recently used first; a segment before its
        parents."""

    def bind(self, model: nn.Module) -> None:
        """Make this the cache of a model.

        Raises:
            ValueError: if it is already that of another one.
        """
        if self._model is None:
            self._model = weakref.ref(model)
        if self._model() is not model:
            raise ValueError(
                "got a ChatCache that another model has used; expected one of its own for each model: make a new one"
            )

    def resize(self, max_bytes: int) -> None:
        """Change `max_bytes`; it counts at the end of the running answer, if there is one."""
        self.max_bytes = max_bytes
        # A running answer drops what is too much when it stores its own keys and values.
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
        """Keys and values of the longest known beginning.

        Returns:
            Its length L and the tensors that were stored, `[1, heads, L, width]`, each copied when its turn comes; no
            tensors if L is 0.
        """
        path = self._find_path(keys)
        self._touch(path)
        parts = [[tensor[..., :count, :] for tensor in self._kept[segment]] for segment, count in path]
        return sum(count for _, count in path), (torch.cat(pieces, dim=-2) for pieces in zip(*parts))

    def store_prefix(self, keys: Sequence[TokenKey], tensors: list[torch.Tensor]) -> None:
        """Copy what is new: tensors `[1, heads, L, width]`, which are keys and values of L tokens.

        The list is emptied: if nothing else holds a tensor, its memory is free before the next one is copied. New
        tokens that alone are larger than `max_bytes` are not kept.
        """
        path = self._find_path(keys)
        length = sum(count for _, count in path)
        num_new_bytes = sum(tensor[..., length:, :].nbytes for tensor in tensors)
        if length < len(keys) and num_new_bytes <= self.max_bytes:
            new_tensors = []
            while tensors:
                new_tensors.append(_own(tensors.pop(0)[..., length:, :]))
            if path:
                path[-1] = (self._split(*path[-1]), path[-1][1])
            parent = path[-1][0] if path else self._root
            leaf = _Segment(list(keys[length:]), parent)
            parent.children[leaf.keys[0]] = leaf
            self._keep(leaf, new_tensors)
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
        """Move the first tokens of a segment to a new one, which is returned."""
        if count == len(tail.keys):
            return tail
        head = _Segment(tail.keys[:count], tail.parent)
        head.parent.children[head.keys[0]] = head
        tail.keys, tail.parent = tail.keys[count:], head
        head.children[tail.keys[0]] = tail
        tensors = self._kept[tail]
        self._kept[tail] = [_own(tensor[..., count:, :]) for tensor in tensors]
        self._kept[head] = [_own(tensor[..., :count, :]) for tensor in tensors]
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


@dataclass(frozen=True)
class PromptImage:
    row: int
    """Row of `pixel_values`."""
    digest: bytes
    start: int
    """Position of its first token in the prompt."""
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


def key_tokens(prompt_ids: list[int], images: list[PromptImage], scope: bytes) -> list[TokenKey]:
    """Keys of a prompt in the tree of a ChatCache, where equal pictures of one scope match, and nothing of two."""
    keys: list[TokenKey] = list(prompt_ids)
    for image in images:
        keys[image.start : image.start + image.num_tokens] = [image.digest] * image.num_tokens
    # Conversations with different first keys share no part of the tree.
    keys[0] = scope + str(keys[0]).encode()
    return keys


def iterate_unknown(images: list[PromptImage], num_known: int) -> Iterator[tuple[PromptImage, int]]:
    """Images of which tokens follow the known ones, and how many tokens of each are known."""
    for image in images:
        if image.start + image.num_tokens > num_known:
            yield image, max(0, num_known - image.start)


def load_features(
    model: PreTrainedModel, cache: ChatCache, images: list[tuple[PromptImage, BatchFeature]]
) -> list[torch.Tensor]:
    """Features `[N, D]` of images, which are given with the inputs that hold their pixels; new ones are cached."""
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


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own; a view would keep the whole tensor that it was cut from."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _count_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
