"""Text from tokens as they come, threads that end when they should, and sampling with a seed."""

import threading
from functools import partial

import pytest
import torch

from modeling_llava.inference.token_stream import StreamedText, build_sampler, find_answer_end, stream_tokens
from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from tests.conftest import GOLDENS
from tests.tiny import tiny_processor, tiny_tokenizer

TEXTS = [
    "It is a red circle.",
    "  naïve Ünïcode, 你好吗, 🙂 ...",
    "def f(x):\n    if x :\n\n        return x  # ok\n",
    "𓀀𓀁 and 🦜🦜",
]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    return tiny_tokenizer() if request.param == "bytes" else load_sentencepiece_tokenizer(GOLDENS)


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_add_up_to_the_decoded_text(tokenizer, text):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    streamed = StreamedText(tokenizer)
    pieces = [streamed.add(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).lstrip() == text.lstrip()
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 2
    assert streamed.finish() == ""


@pytest.mark.parametrize("text", ["A #1 ## and #", "One.##\n#", "", "Two.###Human: why?", "###"])
def test_nothing_from_the_end_on_is_given(tokenizer, text):
    streamed = StreamedText(tokenizer, end="###")
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(streamed.add(token))
        if streamed.has_ended:
            break
    assert "".join([*pieces, streamed.finish()]) == text.partition("###")[0]
    assert streamed.has_ended == ("###" in text)


@pytest.mark.parametrize(
    "template, end",
    [("llava_v0", "###"), ("v0_mmtag", "###"), ("vicuna_v1", "</s>"), ("plain", ""), ("phi_3", "<|end|>")],
)
def test_the_end_of_an_answer_is_what_the_template_writes_behind_it(template, end):
    assert find_answer_end(tiny_processor(template=template)) == end


@pytest.mark.parametrize("refused, end", [("image", "!!"), ("text", "!!"), ("assistant", "")])
def test_a_template_may_refuse_what_it_is_asked_about(refused, end):
    processor = tiny_processor()
    template = "{% for message in messages %}"
    if refused == "assistant":
        template += "{% if message.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    else:
        template += (
            "{% if message.role == 'user' and (message.content | length == 2) == " + str(refused == "image").lower()
        ) + " %}{{ raise_exception('no') }}{% endif %}"
    template += "{{ message.content[-1].text }}{% endfor %}!!"
    processor.chat_template = template
    assert find_answer_end(processor) == end


def test_an_answer_cut_in_a_character_shows_the_whole_ones(tokenizer):
    ids = tokenizer("ok 𓀀𓀁", add_special_tokens=False)["input_ids"][:-1]
    streamed = StreamedText(tokenizer)
    text = "".join([*map(streamed.add, ids), streamed.finish()])
    assert text.rstrip("\ufffd") == "ok 𓀀"


def test_tokens_come_with_rising_times_and_errors_come_last():
    def generate(streamer, stopping_criteria):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in (7, 8):
            streamer.put(torch.tensor([token]))
        streamer.end()
        raise RuntimeError("broken")

    lock, tokens, times = threading.Lock(), [], []
    with pytest.raises(RuntimeError, match="broken"):
        for token, time in stream_tokens(generate, lock=lock):
            tokens.append(token)
            times.append(time)
    assert tokens == [7, 8]
    assert times == sorted(times)
    assert not lock.locked()


def test_closing_asks_the_thread_to_stop_and_waits_for_it():
    ended = threading.Event()

    def generate(streamer, stopping_criteria):
        streamer.put(torch.zeros(1, 1))
        while not stopping_criteria(torch.zeros(1, 1), None).all():
            streamer.put(torch.tensor([5]))
        ended.set()

    lock = threading.Lock()
    tokens = stream_tokens(generate, lock=lock)
    assert next(tokens)[0] == 5
    tokens.close()
    assert ended.is_set() and not lock.locked()


def sample(scores: torch.Tensor, **settings) -> torch.Tensor:
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    return build_sampler(**settings, device="cpu")(ids, scores).argmax(dim=-1)


def test_samples_have_the_probabilities_of_the_scores():
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    sampled = sample(scores, temperature=2.0, top_p=1.0, seed=0).bincount(minlength=4) / len(scores)
    torch.testing.assert_close(sampled, (scores[0] / 2).softmax(dim=-1), atol=0.01, rtol=0)
    sampled = sample(scores, temperature=1.0, top_p=0.6, seed=0)
    assert sampled.unique().tolist() == [2]


def test_samples_of_a_seed_do_not_depend_on_other_threads():
    scores = torch.zeros(1000, 5)
    alone = [sample(scores, temperature=1.0, top_p=1.0, seed=seed) for seed in range(4)]
    together = {}

    def run(seed: int) -> None:
        together[seed] = sample(scores, temperature=1.0, top_p=1.0, seed=seed)

    threads = [threading.Thread(target=partial(run, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(4))
    assert not torch.equal(alone[0], alone[1])


def test_temperature_0_leaves_the_scores_alone():
    assert len(build_sampler(temperature=0.0, top_p=0.5, seed=0, device="cpu")) == 0
