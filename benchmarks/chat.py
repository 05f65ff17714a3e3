"""Time to the first token of five turns about a picture: ChatSession, and transformers' own class with its `generate`.

    python -m benchmarks.chat [--device cpu] [--size mid] [--rounds 3] [--new-tokens 32]

Same weights, processor and conversation; the picture has 576 tokens and comes with the first question. A time runs
from the messages to the first token, preparing the picture included. The two take turns, and every round starts with
nothing. In 32 bits the tokens of the answers must be equal, or the benchmark fails; in 16 bits rounding decides
between logits that are nearly equal. Random weights speak no language: their answers are split into other tokens when
they are tokenized again, so that ChatSession has to compute them once more. Those of a trained model are not. The
limit counts the tokens that are new in a turn, and the picture in the first one; attention is left out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedModel

from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.token_stream import encode_question
from processing_llava import AnyLlavaProcessor

from .models import TILE_SIZE, build_pair, build_processor, make_noise
from .report import render_table
from .roofline import count_operations, count_weights
from .timing import Row, build_parser, clock, compare, default_dtype, prepare

QUESTIONS = [
    "What do you see in this picture? Describe it in one or two sentences.",
    "Which colours does it have, and which of them is the brightest?",
    "Is there anything in the upper left corner that looks like a letter or a number?",
    "How would you explain this picture to somebody on the telephone?",
    "Give it a title of at most five words.",
]


class Answer(NamedTuple):
    num_prompt_tokens: int
    ids: list[int]


def record_answers(model: PreTrainedModel) -> list[Answer]:
    """A list that gets every answer of `model.generate` from now on."""
    answers: list[Answer] = []
    generate = model.generate

    def record(**settings) -> torch.Tensor:
        output_ids = generate(**settings)
        num_prompt_tokens = settings["input_ids"].shape[1]
        answers.append(Answer(num_prompt_tokens, output_ids[0, num_prompt_tokens:].tolist()))
        return output_ids

    model.generate = record
    return answers


def answer_with_generate(model: PreTrainedModel, processor: AnyLlavaProcessor, messages: list, num_tokens: int) -> str:
    inputs = encode_question(messages, processor).to(model.device)
    output_ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def answer_with_session(session: ChatSession, messages: list, num_tokens: int) -> str:
    return "".join(session.answer(messages, max_new_tokens=num_tokens))


def talk(answer: Callable[[list, int], str], image: Image.Image, *, num_tokens: int, device: str) -> list[float]:
    """Ask every question; returns the seconds to each first token."""
    messages: list[dict[str, Any]] = []
    seconds = []
    for question in QUESTIONS:
        pictures = [] if messages else [{"type": "image", "image": image}]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        start = clock(device)
        answer(messages, 1)
        seconds.append(clock(device) - start)
        messages.append({"role": "assistant", "content": answer(messages, num_tokens)})
    return seconds


def count_work(model: PreTrainedModel, answers: list[Answer], *, device: str) -> list[dict[str, float]]:
    """Bytes and operations of each turn, after one of which there are two answers: one token, and all."""
    layers, itemsize = model.model.language_model.layers, model.dtype.itemsize
    pixels = torch.zeros(1, 3, TILE_SIZE, TILE_SIZE, device=device, dtype=model.dtype)
    turns, num_known_tokens = [], 0
    for answer in answers[1::2]:
        num_new_tokens = max(1, answer.num_prompt_tokens - num_known_tokens)
        turns.append(
            {
                "bytes": count_weights(layers, model.lm_head),
                "operations": 2 * num_new_tokens * count_weights(layers) // itemsize,
            }
        )
        num_known_tokens = answer.num_prompt_tokens + len(answer.ids)
    with torch.no_grad():
        turns[0]["operations"] += count_operations(partial(model.get_image_features, pixels, return_dict=True))
    return turns


def measure(device: str, size: str, rounds: int, *, num_tokens: int = 32) -> list[Row]:
    """A row for each turn, as `benchmarks.timing` describes it; a first round does not count.

    Raises:
        RuntimeError: if the answers differ.
    """
    prepare(device)
    ours, peer = build_pair(size, device=device, dtype=default_dtype(device))
    processor = build_processor()
    image = make_noise(torch.Generator().manual_seed(0))
    times: dict[str, list[list[float]]] = {"peer": [], "ours": []}
    answers = {"peer": record_answers(peer), "ours": record_answers(ours)}
    for _ in range(rounds + 1):
        talkers = {
            "peer": partial(answer_with_generate, peer, processor),
            "ours": partial(answer_with_session, ChatSession(ours, processor)),
        }
        for kind, answer in talkers.items():
            times[kind].append(talk(answer, image, num_tokens=num_tokens, device=device))
        if ours.dtype == torch.float32 and answers["ours"] != answers["peer"]:
            raise RuntimeError("the answers differ")
    turns = {kind: list(zip(*seconds[1:])) for kind, seconds in times.items()}
    work = count_work(ours, answers["ours"][: 2 * len(QUESTIONS)], device=device)
    return [
        compare(f"turn {turn + 1} to the first token", turns["ours"][turn], turns["peer"][turn], **work[turn])
        for turn in range(len(QUESTIONS))
    ]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    print(render_table(measure(arguments.device, arguments.size, arguments.rounds, num_tokens=arguments.new_tokens)))


if __name__ == "__main__":
    main()
