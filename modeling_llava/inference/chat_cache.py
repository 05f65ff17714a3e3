"""ChatCache: key/value states and image features that the next turn of a conversation can use.

The states form a tree: a segment holds those of a stretch of tokens, and is split in two where conversations part (as
in SGLang's RadixAttention, arXiv:2312.07104). So what conversations share is kept once, a branch never destroys what
another one needs, and a bound in bytes drops the stretch that was used least recently.

What is surprising: the key of a token is its id, but that of an image token is the digest of its image. Equal ids of
different pictures do not match.
"""

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import nn
from transformers import StaticCache

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
        self.static_states: dict[int, StaticCache] = {}
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
            self.static_states.clear()
            self._root = _Segment([])
            self._kept = {}

    def find_states(self, keys: Sequence[TokenKey]) -> tuple[int, Iterator[torch.Tensor]]:
        """The states of the longest known beginning.

        Returns:
            Its length L and the tensors that were stored, `[1, heads, L, width]`, each copied when its turn comes; no
            tensors if L is 0.
        """
        path = self._find_path(keys)
        self._touch(path)
        parts = [[states[..., :count, :] for states in self._kept[segment]] for segment, count in path]
        return sum(count for _, count in path), (torch.cat(pieces, dim=-2) for pieces in zip(*parts))

    def store_states(self, keys: Sequence[TokenKey], states: list[torch.Tensor]) -> None:
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
