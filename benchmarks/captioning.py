"""Answering many mixed requests: `generate_answers`, and transformers' own class with `generate` on padded batches.

    python -m benchmarks.captioning [--device cpu] [--size mid] [--rounds 3] [--requests NUMBER]

A fifth of the requests shows no picture and a fifth shows two. Answers are as long as in LLaVA's instruction data by
its published composition: half of them words or letters, a quarter phrases and boxes, the others paragraphs. Same
weights, same processor, and the same number of new tokens for each request on both sides. In 32 bits the answers must
be equal token by token, or the benchmark fails; in 16 bits rounding decides between tokens that are nearly equal. On a
GPU ours compiles the steps in which no request joins. The limit counts what ours computes, and the weights once for
each token of the longest answer.

The peer's batches are filled in the order of the requests. It is given the batch size with which it is fastest, found
on the first quarter of the requests. Preparing text and pictures counts on both sides.

"mid" is a ViT-B/32 at 384 pixels, 144 tokens, and a language model of 24 layers of width 512; the other sizes are
those of `benchmarks.models`.
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel

from modeling_llava import AnyLlavaConfig
from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.loading import prepare_for_answering
from processing_llava import AnyLlavaProcessor

from .models import IMAGE_TOKEN_ID, WORDS, build_config, build_model, build_peer, build_processor, make_noise
from .report import render_table
from .roofline import count_operations, count_weights
from .timing import Row, build_parser, clock, compare, default_dtype, interleave, prepare

NUM_REQUESTS = {"cpu": 32, "cuda": 128}
MAX_ROWS = {"cpu": 16, "cuda": 32}
PEER_BATCH_SIZES = {"cpu": (1, 2, 4, 8), "cuda": (1, 4, 8, 16, 32)}
KINDS_OF_ANSWERS = {"words": (0.47, 1, 5), "phrases": (0.23, 8, 24), "paragraphs": (0.30, 60, 200)}
"""Share of the 665 thousand rows of LLaVA-1.5, and the least and the most tokens (assumed)."""


def build_inputs(size: str, *, device: str) -> tuple[PreTrainedModel, PreTrainedModel, AnyLlavaProcessor]:
    """Our model, that of transformers' own class, and a processor for both; none ends an answer by itself."""
    if size == "mid":
        processor = build_processor(384, 32)
        text = LlamaConfig(
            vocab_size=32000, hidden_size=512, num_hidden_layers=24, num_attention_heads=8, intermediate_size=1376
        )
        vision = CLIPVisionConfig(image_size=384, patch_size=32)
        config = AnyLlavaConfig(vision, text, image_token_id=IMAGE_TOKEN_ID)
    else:
        processor, config = build_processor(), build_config(size)
    processor.tokenizer.pad_token = processor.tokenizer.unk_token
    ours = build_model(config, device=device, dtype=default_dtype(device))
    # The token that ends an answer in the format of the processor is never the greedy one, whose logit is above 0.
    ours.lm_head.weight.data[processor.tokenizer.eos_token_id].zero_()
    peer = build_peer(ours)
    prepare_for_answering(ours)
    for model in (ours, peer):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return ours, peer, processor


def build_requests(num_requests: int) -> list[AnswerRequest]:
    """Requests of mixed lengths, each with pictures of its own."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    requests, kinds = [], list(KINDS_OF_ANSWERS.values())
    for _ in range(num_requests):
        content: list[dict[str, Any]] = []
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            content.append({"type": "image", "image": make_noise(generator)})
        question = " ".join(rng.choices(WORDS, k=1 + min(200, int(rng.lognormvariate(3.0, 0.8)))))
        ((_, shortest, longest),) = rng.choices(kinds, weights=[share for share, _, _ in kinds])
        num_new_tokens = rng.randint(shortest, longest)
        content.append({"type": "text", "text": question})
        requests.append(AnswerRequest([{"role": "user", "content": content}], max_new_tokens=num_new_tokens))
    return requests


def answer_batched(
    model: PreTrainedModel,
    processor: AnyLlavaProcessor,
    requests: list[AnswerRequest],
    max_rows: int,
    *,
    compile: bool = False,
) -> list[list[int]]:
    settings = {"max_rows": max_rows, "max_cache_tokens": max_rows * 2048, "compile": compile}
    answers = list(generate_answers(model, processor, requests, **settings))
    return [answer.ids for answer in sorted(answers, key=lambda answer: answer.index)]


def answer_padded(
    model: PreTrainedModel, processor: AnyLlavaProcessor, requests: list[AnswerRequest], batch_size: int
) -> list[list[int]]:
    """Answers of `generate`, which stops when the last row of a batch stops."""
    answers = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [request.messages for request in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        num_new_tokens = [request.max_new_tokens for request in batch]
        output_ids = model.generate(**inputs, max_new_tokens=max(num_new_tokens), do_sample=False)
        new_ids = output_ids[:, inputs["input_ids"].shape[1] :].tolist()
        answers += [ids[:count] for ids, count in zip(new_ids, num_new_tokens)]
    return answers


def measure(
    device: str,
    size: str,
    rounds: int,
    *,
    num_requests: int | None = None,
    peer_batch_sizes: Sequence[int] | None = None,
) -> list[Row]:
    """The row of this work, as `benchmarks.timing` describes it.

    Raises:
        RuntimeError: if the answers differ.
    """
    prepare(device)
    num_requests = num_requests or NUM_REQUESTS[device]
    ours, peer, processor = build_inputs(size, device=device)
    requests = build_requests(num_requests)
    seconds = {}
    for batch_size in peer_batch_sizes or PEER_BATCH_SIZES[device]:
        start = clock(device)
        answer_padded(peer, processor, requests[: num_requests // 4], batch_size)
        seconds[batch_size] = clock(device) - start
    best = min(seconds, key=seconds.get)
    answers = {"ours": [], "peer": []}
    answer = partial(answer_batched, ours, processor, requests, MAX_ROWS[device])
    jobs = {
        "ours": lambda: answers["ours"].append(answer(compile=device != "cpu")),
        "peer": lambda: answers["peer"].append(answer_padded(peer, processor, requests, best)),
    }
    times = interleave(jobs, rounds=rounds, device=device)
    lengths = [request.max_new_tokens for request in requests]
    work = {
        "bytes": count_weights(ours.model.language_model.layers, ours.lm_head) * max(lengths) / sum(lengths),
        "operations": count_operations(answer) / sum(lengths),
    }
    for own_ids, peer_ids in zip(answers["ours"], answers["peer"]):
        if [len(ids) for ids in own_ids] != lengths or (ours.dtype == torch.float32 and own_ids != peer_ids):
            different = [index for index, (own, other) in enumerate(zip(own_ids, peer_ids)) if own != other]
            raise RuntimeError(f"the answers to requests {different} differ")
    name = f"batch captioning, {num_requests} mixed requests"
    peer_name = f"transformers, batches of {best}"
    settings = {"unit": "tokens/s", "amount": sum(lengths), "peer_name": peer_name}
    return [compare(name, times["ours"], times["peer"], **settings, **work)]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--requests", type=int, help="32 on a CPU, 128 on a GPU")
    arguments = parser.parse_args()
    print(render_table(measure(arguments.device, arguments.size, arguments.rounds, num_requests=arguments.requests)))


if __name__ == "__main__":
    main()
