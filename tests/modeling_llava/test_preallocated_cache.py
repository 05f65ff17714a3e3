"""A preallocated KV cache holds what transformers' own holds, and is not copied for every token."""

import pytest
import torch
from transformers import DynamicCache

from modeling_llava.generation import PreallocatedLayer, count_spare_tokens, preallocate
from tests.tiny import IMAGE_TOKEN_ID, batch, random_images, text_ids, tiny_model


def build_caches() -> tuple[DynamicCache, DynamicCache]:
    config = tiny_model().config.text_config
    preallocated = DynamicCache(config=config)
    preallocate(preallocated)
    return preallocated, DynamicCache(config=config)


def append(caches: tuple[DynamicCache, DynamicCache], num_tokens: int, *, rows: int = 2) -> None:
    for layer in range(2):
        new = torch.randn(2, rows, 4, num_tokens, 8)
        first, second = (cache.update(*new, layer) for cache in caches)
        assert all(torch.equal(*pair) for pair in zip(first, second))


@torch.no_grad()
def test_every_way_of_changing_a_cache():
    caches = build_caches()
    append(caches, 5)
    for change in (
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.crop(-1),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False])),
    ):
        for cache in caches:
            change(cache)
        rows = len(caches[1].layers[0].keys)
        append(caches, 1, rows=rows)
        append(caches, count_spare_tokens(rows), rows=rows)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    append(caches, 2, rows=3)
    for cache in caches:
        cache.reset()
    append(caches, 4)


@torch.no_grad()
def test_tokens_are_added_in_place():
    caches = build_caches()
    append(caches, 5)
    start = caches[0].layers[0].keys.data_ptr()
    for _ in range(count_spare_tokens(2)):
        append(caches, 1)
    assert caches[0].layers[0].keys.data_ptr() == start
    append(caches, 1)
    assert caches[0].layers[0].keys.data_ptr() != start


def test_gradients_pass_through_a_cache():
    preallocated, plain = build_caches()
    gradients = []
    for cache in (preallocated, plain):
        torch.manual_seed(0)
        tensors = torch.randn(3, 1, 4, 2, 8, requires_grad=True)
        total = sum((cache.update(new, new, 0)[0] ** 2).sum() for new in tensors)
        total.backward()
        gradients.append(tensors.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generate_uses_them(settings):
    model = tiny_model()
    inputs = batch([[1, *[IMAGE_TOKEN_ID] * 16, *text_ids(4)]])
    output = model.generate(
        **inputs,
        pixel_values=random_images(1),
        do_sample=False,
        max_new_tokens=4,
        return_dict_in_generate=True,
        **settings,
    )
    assert {type(layer) for layer in output.past_key_values.layers} == {PreallocatedLayer}


def test_a_cache_of_inference_mode_can_grow_outside_it():
    caches = build_caches()
    with torch.inference_mode():
        append(caches, 5)
    with torch.no_grad():
        append(caches, 1)


@torch.no_grad()
def test_a_cache_without_a_config_is_preallocated():
    model = tiny_model()
    inputs = batch([[1, *text_ids(5)]])
    cache = model.generate(
        **inputs, past_key_values=DynamicCache(), return_dict_in_generate=True, max_new_tokens=2
    ).past_key_values
    assert {type(layer) for layer in cache.layers} == {PreallocatedLayer}


@torch.no_grad()
def test_a_graph_holds_the_cache():
    model = tiny_model()
    cache = DynamicCache(config=model.config.text_config)
    preallocate(cache)
    inputs = batch([[1, *text_ids(5)]])
    expected = model(**inputs, past_key_values=DynamicCache(config=model.config.text_config)).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs, past_key_values=cache).logits, expected)
    token = {"input_ids": torch.tensor([[7]])}
    expected = model(input_ids=torch.cat([inputs["input_ids"], token["input_ids"]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(compiled(**token, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
