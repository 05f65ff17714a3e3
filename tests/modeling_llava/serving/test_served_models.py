"""Models of a server within their memory, and a batch that fails."""

import asyncio
from functools import partial

import pytest
import torch

from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import BatchedGeneration
from modeling_llava.inference.loading import load_for_inference
from modeling_llava.inference.row_cache import RowCache
from modeling_llava.serving.engine_thread import Busy, EngineThread
from modeling_llava.serving.model_menu import HEADROOM, MemoryShort, estimate_bytes
from modeling_llava.serving.served_models import MIN_CACHE_TOKENS, ServedModels, count_token_bytes
from tests.modeling_llava.inference.session_models import CAT, MODELS, user
from tests.tiny import save_tiny_checkpoint

SETTINGS = {"device": "cpu", "max_rows": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    return [str(save_tiny_checkpoint(tmp_path_factory.mktemp(name))) for name in ("first", "second")]


async def read(engine: EngineThread, **settings) -> str:
    request = AnswerRequest([user("What?", CAT)], **{"max_new_tokens": 4} | settings)
    return "".join([part.text async for part in engine.answer(request)])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mpt"])
def test_a_token_takes_what_the_cache_of_a_batch_takes(name, monkeypatch):
    model, processor = MODELS[name]()
    caches = []
    monkeypatch.setattr(
        "modeling_llava.inference.batched_generation.RowCache",
        lambda **settings: caches.append(RowCache(**settings)) or caches[-1],
    )
    batch = BatchedGeneration(model, processor, max_rows=1, max_cache_tokens=512)
    batch.add(0, AnswerRequest([user("a")], max_new_tokens=3))
    batch.step()
    layers = [tensor for layer in caches[0]._layers.values() for tensor in layer]
    slots, _, room, _ = layers[0].shape
    assert sum(tensor.nbytes for tensor in layers) == count_token_bytes(model) * slots * room


def test_what_nobody_asks_makes_room_and_what_answers_stays(folders):
    size = estimate_bytes(folders[0], torch.device("cpu"))
    model, _ = load_for_inference(folders[0])
    # Less than the second model needs.
    cache = 2 * 192 * count_token_bytes(model)
    assert cache < size
    models = ServedModels(folders, memory=size + cache + HEADROOM, max_cache_tokens=192, **SETTINGS)
    first, second = models.names
    assert asyncio.run(read(models.load(first))) is not None
    models.load(second)
    assert list(models.engines) == [second]
    # One that is answering.
    number = models.engines[second].begin(AnswerRequest([user("a")]), lambda part: None)
    with pytest.raises(MemoryShort, match=f"{first} needs"):
        models.load(first)
    models.engines[second].leave(number)
    assert models.load(first).batch.model is not None and list(models.engines) == [first]
    models.close()


def test_the_kv_cache_is_what_memory_allows(folders, caplog):
    size = estimate_bytes(folders[0], torch.device("cpu"))
    model, _ = load_for_inference(folders[0])
    token = count_token_bytes(model)
    build = partial(ServedModels, folders[:1], max_cache_tokens=2**20, **SETTINGS)
    models = build(memory=size + HEADROOM + 2 * 3000 * token + 100)
    engine = models.load(models.names[0])
    assert 2900 <= engine.batch._row_cache.max_tokens <= 3000
    assert "tokens at a time" in caplog.text
    models.close()
    with pytest.raises(MemoryShort, match="for one answer at a time"):
        build(memory=size + HEADROOM + MIN_CACHE_TOKENS * token).load(models.names[0])


def test_a_step_that_fails_loses_its_requests_and_no_others(monkeypatch):
    model, processor = load_for_inference()
    engine = EngineThread(BatchedGeneration(model, processor), max_open=3)
    step = BatchedGeneration.step

    def fail(batch):
        monkeypatch.setattr(BatchedGeneration, "step", step)
        raise MemoryError("no room")

    expected = asyncio.run(read(engine))
    monkeypatch.setattr(BatchedGeneration, "step", fail)
    with pytest.raises(MemoryError):
        asyncio.run(read(engine))
    assert engine.num_open == 0
    assert asyncio.run(read(engine)) == expected
    engine.close()


def test_places_are_counted_and_freed():
    model, processor = load_for_inference()
    engine = EngineThread(BatchedGeneration(model, processor), max_open=2)
    request = AnswerRequest([user("a")], max_new_tokens=2)
    numbers = [engine.begin(request, lambda part: None) for _ in range(2)]
    with pytest.raises(Busy):
        engine.begin(request, lambda part: None)
    engine.leave(numbers[0])
    # One that left before it was prepared never joins.
    engine.submit(numbers[0], request)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        asyncio.run(read(engine, max_new_tokens=0))
    assert engine.num_open == 1
    assert asyncio.run(read(engine)) is not None
    engine.leave(numbers[1])
    engine.close()
    assert engine.num_open == 0
