"""Compiled decoding: the tokens of plain decoding, from one graph for all tokens and turns."""

import threading
from functools import partial

import PIL.Image
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from modeling_llava.acceleration.cpu_layers import PackedLinear
from modeling_llava.acceleration.quantization import quantize_to_int8
from modeling_llava.inference import batched_generation, cached_generation
from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.cached_generation import (
    CachedGeneration,
    build_compile_config,
    build_static_cache,
    decode_ahead,
)
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import prepare_for_answering
from modeling_llava.inference.token_stream import StreamedText
from tests.tiny import tiny_model, tiny_processor

SETTINGS = {"max_new_tokens": 8}
RED, BLUE = PIL.Image.new("RGB", (60, 40), "red"), PIL.Image.new("RGB", (30, 70), "blue")
QUESTIONS = [("What is this?", [RED]), ("Is it big?", []), ("And this?", [BLUE])]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled; each computes what it was traced from, without a C++ compiler."""
    torch._dynamo.reset()
    seen = []

    def keep(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    # Down to the operators that CUDA graphs would record.
    backend = aot_autograd(fw_compiler=keep)

    def build(device: torch.device) -> CompileConfig:
        config = build_compile_config(device)
        config.backend = backend
        return config

    for module in (cached_generation, batched_generation):
        monkeypatch.setattr(module, "build_compile_config", build)
    yield seen
    torch._dynamo.reset()


def talk(session: ChatSession) -> list[str]:
    return ["".join(session.ask(question, images=images, **SETTINGS)) for question, images in QUESTIONS]


def build(text: str = "llama"):
    processor = tiny_processor()
    return tiny_model(text, image_token_id=processor.image_token_id), processor


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_one_graph_for_all_tokens_and_turns(graphs, text, is_prepared):
    model, processor = build(text)
    expected = talk(ChatSession(model, processor))
    if is_prepared:
        prepare_for_answering(model, torch.device("cuda"))
    session = ChatSession(model, processor, compile=True)
    assert talk(session) == expected
    assert session.statistics.num_reused_tokens > 0
    assert len(graphs) == 1
    operators = {node.target for node in graphs[0].graph.nodes}
    assert torch.ops.aten._assert_async.msg in operators
    # CUDA graphs cannot hold what waits for the device.
    assert torch.ops.aten._local_scalar_dense.default not in operators
    # Nor is a call of a library fused with what lies around it.
    assert not any("scaled_dot_product" in str(operator) for operator in operators)


def test_answers_that_end_early_can_be_continued(graphs, monkeypatch):
    model, processor = build()
    without_end, made = talk(ChatSession(model, processor)), []
    streamed = StreamedText.add
    monkeypatch.setattr(StreamedText, "add", lambda text, token: made.append(token) or streamed(text, token))
    talk(ChatSession(model, processor))
    model.generation_config.eos_token_id = made[2]
    expected = talk(ChatSession(model, processor))
    assert len(expected[0]) < len(without_end[0])
    session = ChatSession(model, processor, compile=True)
    assert talk(session) == expected
    assert session.statistics.num_reused_tokens > 0


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(len(value), -1))

    def end(self) -> None:
        self.pieces.append(None)


@pytest.mark.parametrize("end_of", [(0, 2), (1, 4), None], ids=str)
def test_rows_end_where_generate_ends_them(graphs, end_of):
    """Rows that end at different tokens, or at none; and a cache that has no room for one more."""
    model, _ = build()
    ids = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    settings: dict = {"max_new_tokens": 7, "do_sample": False}
    if end_of is not None:
        row, token = end_of
        settings |= {"eos_token_id": int(model.generate(ids, **settings)[row, 6 + token]), "pad_token_id": 0}
    expected, streamer = model.generate(ids, **settings), Recorder()
    config = cached_generation.build_compile_config(model.device)
    static = {"cache_implementation": "static", "compile_config": config}
    loop = partial(decode_ahead, streamer=streamer)
    found = model.generate(ids, **settings, **static, custom_generate=loop, streamer=streamer)
    assert found.tolist() == expected.tolist()
    assert streamer.pieces.pop() is None
    assert torch.cat(streamer.pieces, dim=1).tolist() == expected.tolist()
    assert len(graphs) == 1


def answer_together(model, processor, *, compile: bool) -> dict[int, list[int]]:
    """Six requests in four places, where they join and leave."""
    requests = []
    for index, (question, images) in enumerate(QUESTIONS * 2):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        requests.append(AnswerRequest([{"role": "user", "content": content}], max_new_tokens=3 + 2 * index))
    answers = list(generate_answers(model, processor, requests, max_rows=4, max_cache_tokens=4 * 512, compile=compile))
    assert [answer.error for answer in answers] == [None] * 6
    return {answer.index: answer.ids for answer in answers}


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_a_batch_has_one_graph_for_all_its_steps(graphs, text):
    model, processor = build(text)
    expected = answer_together(model, processor, compile=False)
    prepare_for_answering(model, torch.device("cuda"))
    assert answer_together(model, processor, compile=True) == expected
    assert len(graphs) == 1
    assert torch.ops.aten._local_scalar_dense.default not in {node.target for node in graphs[0].graph.nodes}


def test_a_request_that_is_longer_than_a_place_is_refused(graphs):
    model, processor = build()
    request = AnswerRequest([{"role": "user", "content": "Why?"}], max_new_tokens=128)
    (answer,) = generate_answers(model, processor, [request], max_rows=4, max_cache_tokens=4 * 128, compile=True)
    assert "at most 128" in str(answer.error)


def test_torch_knows_the_settings_for_a_gpu():
    from torch._inductor import list_options

    assert build_compile_config(torch.device("cuda")).options.keys() <= set(list_options())


def test_static_caches_have_few_lengths_and_are_reused():
    model, _ = build()
    made = {}
    caches = [build_static_cache(model, num_tokens, made=made) for num_tokens in (1, 1024, 1025, 2049)]
    assert [one.get_max_length() for one in caches] == [1024, 1024, 2048, 4096]
    assert caches[0] is caches[1]


def test_all_answers_are_made_in_one_thread(graphs, monkeypatch):
    """PyTorch keeps CUDA graphs for the thread that recorded them."""
    model, processor = build()
    threads, cache, run = set(), ChatCache(), CachedGeneration.run
    monkeypatch.setattr(
        CachedGeneration, "run", lambda *args, **settings: threads.add(threading.get_ident()) or run(*args, **settings)
    )
    for _ in range(2):
        talk(ChatSession(model, processor, cache=cache, compile=True))
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(cache.static_caches) == [1024]


def test_what_cannot_be_compiled_is_refused():
    model, processor = build("mpt")
    with pytest.raises(ValueError, match="MptModel.*leave compile out"):
        ChatSession(model, processor, compile=True)
    model, processor = build("mistral")
    model.config.text_config.sliding_window = 4096
    with pytest.raises(ValueError, match="sliding window"):
        ChatSession(model, processor, compile=True)
    model, processor = build()
    quantize_to_int8(model)
    with pytest.raises(ValueError, match="for answering on a CPU"):
        ChatSession(model, processor, compile=True)
    # Layers may be too small to be packed, where the output layer is not.
    model, processor = build()
    model.lm_head = PackedLinear(model.lm_head)
    with pytest.raises(ValueError, match="for answering on a CPU"):
        ChatSession(model, processor, compile=True)


@pytest.mark.slow
def test_compiled_for_this_cpu():
    torch._dynamo.reset()
    model, processor = build()
    assert talk(ChatSession(model, processor, compile=True)) == talk(ChatSession(model, processor))
    assert answer_together(model, processor, compile=True) == answer_together(model, processor, compile=False)


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_tokens():
    model, processor = build()
    model.to("cuda")
    assert talk(ChatSession(model, processor, compile=True)) == talk(ChatSession(model, processor))
    assert answer_together(model, processor, compile=True) == answer_together(model, processor, compile=False)
