"""The tree of keys and values: always the longest known beginning, no other branch, no more bytes than allowed."""

import random
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from modeling_llava.inference.chat_cache import ChatCache

LAYERS = 2


def make_tensors(keys: list) -> list[torch.Tensor]:
    """Keys `[1, 2, L, 3]` and values `[1, 1, L, 4]` that depend, as in a model, on all tokens so far."""
    hashes = [float(hash(tuple(keys[: position + 1])) % 10007) for position in range(len(keys))]
    base = torch.tensor(hashes).view(1, 1, -1, 1)
    return [(base + layer).expand(1, *shape) for layer in range(LAYERS) for shape in ((2, -1, 3), (1, -1, 4))]


BYTES_PER_TOKEN = LAYERS * 4 * (2 * 3 + 1 * 4)


def count_common(first: list, second: list) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def count_storages(cache: ChatCache) -> int:
    """Bytes of all memory that the cache keeps alive."""
    storages = {tensor.untyped_storage() for tensors in cache._kept.values() for tensor in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_the_longest_beginning_of_many_branches_is_found():
    rng = random.Random(0)
    cache, stored = ChatCache(), []
    for _ in range(300):
        keys = [rng.choice((1, 2, b"cat")) for _ in range(rng.randrange(1, 12))]
        length, tensors = cache.find_prefix(keys)
        assert length == max((count_common(keys, other) for other in stored), default=0)
        torch.testing.assert_close(list(tensors), make_tensors(keys[:length]) if length else [])
        cache.store_prefix(keys, make_tensors(keys))
        stored.append(keys)
        assert cache.num_bytes == count_storages(cache)
    # What branches share is kept once.
    num_tokens = len({tuple(keys[:end]) for keys in stored for end in range(1, len(keys) + 1)})
    assert cache.num_bytes == num_tokens * BYTES_PER_TOKEN


def test_the_bound_is_kept_whatever_is_stored():
    rng = random.Random(1)
    cache = ChatCache(max_bytes=40 * BYTES_PER_TOKEN)
    for number in range(500):
        keys = [rng.choice((1, 2, 3)) for _ in range(rng.randrange(1, 30))]
        length, tensors = cache.find_prefix(keys)
        torch.testing.assert_close(list(tensors), make_tensors(keys[:length]) if length else [])
        cache.store_prefix(keys, make_tensors(keys))
        if number % 7 == 0:
            cache.store_features(str(number).encode(), torch.zeros(5, 4))
        assert cache.num_bytes == count_storages(cache) <= cache.max_bytes


def test_what_was_used_least_recently_goes_first():
    cache = ChatCache(max_bytes=6 * BYTES_PER_TOKEN)
    for keys in ([1, 1, 1], [2, 2, 2]):
        cache.store_prefix(keys, make_tensors(keys))
    cache.find_prefix([1, 1])
    cache.store_prefix([3], make_tensors([3]))
    assert [cache.find_prefix([key] * 3)[0] for key in (1, 2, 3)] == [3, 0, 1]


def test_the_shared_beginning_outlives_its_branches():
    cache = ChatCache(max_bytes=5 * BYTES_PER_TOKEN)
    for keys in ([7, 7, 1, 1], [7, 7, 2], [7, 7, 3]):
        cache.store_prefix(keys, make_tensors(keys))
    assert [cache.find_prefix([7, 7, key, key])[0] for key in (1, 2, 3)] == [2, 3, 3]
    cache.find_prefix([7, 7, 2])
    cache.store_prefix([9, 9, 9], make_tensors([9, 9, 9]))
    assert cache.find_prefix([7, 7, 2])[0] == 2


def test_a_conversation_that_does_not_fit_drops_nothing_else():
    cache = ChatCache(max_bytes=4 * BYTES_PER_TOKEN)
    cache.store_prefix([1, 2], make_tensors([1, 2]))
    cache.store_prefix([3] * 9, make_tensors([3] * 9))
    assert cache.find_prefix([1, 2])[0] == 2
    assert cache.find_prefix([3] * 9)[0] == 0


def test_what_is_kept_is_copied_one_tensor_after_the_other():
    tensors = [torch.zeros(1, 1, 8, 4) for _ in range(4)]
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    alive = []
    cache = ChatCache()
    clone = torch.Tensor.clone

    def note(tensor, **settings):
        alive.append(sum(storage() is not None for storage in memory))
        return clone(tensor, **settings)

    with mock.patch.object(torch.Tensor, "clone", note):
        cache.store_prefix([1] * 8, tensors)
    assert alive == [4, 3, 2, 1]
    tensors = [torch.zeros(1, 1, 8, 4)]
    with mock.patch.object(torch.Tensor, "clone", note):
        ChatCache(max_bytes=10).store_prefix([1] * 8, tensors)
    assert len(alive) == 4, "copied what is not kept"


def test_features_are_kept_used_and_dropped_like_keys_and_values():
    features = torch.arange(40.0).view(10, 4)
    cache = ChatCache(max_bytes=features[:5].nbytes * 2)
    for digest, rows in ((b"a", features[:5]), (b"b", features[5:])):
        cache.store_features(digest, rows)
    assert cache.num_bytes == count_storages(cache)
    torch.testing.assert_close(cache.find_features(b"a"), features[:5])
    cache.store_features(b"c", features[:5])
    assert [cache.find_features(digest) is None for digest in (b"a", b"b", b"c")] == [False, True, False]


def test_a_smaller_bound_drops_what_was_used_least_recently():
    cache = ChatCache()
    for keys in ([1, 1, 1], [2, 2, 2]):
        cache.store_prefix(keys, make_tensors(keys))
    cache.resize(4 * BYTES_PER_TOKEN)
    assert [cache.find_prefix([key] * 3)[0] for key in (1, 2)] == [0, 3]
    with cache.lock:
        cache.resize(0)
        cache.store_prefix([3], make_tensors([3]))
    assert cache.num_bytes == count_storages(cache) == 0


def test_clearing_leaves_nothing():
    cache = ChatCache()
    cache.store_prefix([1, 2], make_tensors([1, 2]))
    cache.store_features(b"a", torch.zeros(2, 2))
    cache.clear()
    assert (cache.num_bytes, count_storages(cache)) == (0, 0)
    length, tensors = cache.find_prefix([1, 2])
    assert (length, list(tensors), cache.find_features(b"a")) == (0, [], None)


def test_a_cache_serves_one_model():
    cache, model = ChatCache(), nn.Linear(1, 1)
    cache.bind(model)
    cache.bind(model)
    with pytest.raises(ValueError, match="another model"):
        cache.bind(nn.Linear(1, 1))
