"""Time to the first token of five turns about a picture: ChatSession, and transformers' own class with its `generate`.

    python -m benchmarks.chat [--device cpu] [--rounds 3] [--new-tokens 32]

Same weights, processor and conversation; the picture has 576 tokens and comes with the first question. A time runs
from the messages to the first token, preparing the picture included. The answers must be equal, or the benchmark
fails. The two take turns, and every round starts with nothing. On a CPU, seconds are those of the processor on one
thread, so that other work on the machine does not count. Random weights speak no language: their answers are split
into other tokens when they are read again, so that ChatSession has to compute them once more. Those of a trained
model are not.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration, PreTrainedModel

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.inference import ChatSession
from processing_llava import AnyLlavaImageProcessorPil, AnyLlavaProcessor
from processing_llava.conversation_templates import load_template
from processing_llava.sentencepiece_tokenizer import load_sentencepiece_tokenizer

QUESTIONS = [
    "What do you see in this picture? Describe it in one or two sentences.",
    "Which colours does it have, and which of them is the brightest?",
    "Is there anything in the upper left corner that looks like a letter or a number?",
    "How would you explain this picture to somebody on the telephone?",
    "Give it a title of at most five words.",
]
SIZES = {
    # Of the language model; the tower is a ViT at 336 pixels in patches of 14, 576 tokens.
    "mid": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}


def build_models(size: str, device: str) -> tuple[PreTrainedModel, PreTrainedModel, AnyLlavaProcessor]:
    """Our class, transformers' class with the same weights, and a processor for both."""
    torch.manual_seed(0)
    tokenizer = load_sentencepiece_tokenizer(Path("tests/goldens"))
    sides = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = AnyLlavaProcessor(
        AnyLlavaImageProcessorPil(**sides), tokenizer, chat_template=load_template("vicuna_v1"), patch_size=14
    )
    parts = SIZES[size]
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **parts)
    text = LlamaConfig(vocab_size=32000, **parts)
    ours = AnyLlavaForConditionalGeneration(AnyLlavaConfig(vision, text, image_token_id=processor.image_token_id))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers")
        peer = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return ours.to(device).eval(), peer.to(device).eval(), processor


def answer_with_generate(model: PreTrainedModel, processor: AnyLlavaProcessor, messages: list, num_tokens: int) -> str:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output_ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def answer_with_session(session: ChatSession, messages: list, num_tokens: int) -> str:
    return "".join(session.answer(messages, max_new_tokens=num_tokens))


def talk(answer: Callable[[list, int], str], image: Image.Image, *, num_tokens: int, clock: Callable[[], float]):
    """Ask every question; returns the seconds to each first token and the conversation."""
    messages: list[dict[str, Any]] = []
    seconds = []
    for question in QUESTIONS:
        pictures = [] if messages else [{"type": "image", "image": image}]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        start = clock()
        answer(messages, 1)
        seconds.append(clock() - start)
        messages.append({"role": "assistant", "content": answer(messages, num_tokens)})
    return seconds, messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=tuple(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    ours, peer, processor = build_models(arguments.size, arguments.device)
    noise = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((640, 480))
    times: dict[str, list[list[float]]] = {"generate": [], "session": []}
    for _ in range(arguments.rounds):
        answers = {
            "generate": partial(answer_with_generate, peer, processor),
            "session": partial(answer_with_session, ChatSession(ours, processor)),
        }
        conversations = {}
        for kind, answer in answers.items():
            seconds, conversations[kind] = talk(answer, image, num_tokens=arguments.new_tokens, clock=clock)
            times[kind].append(seconds)
        if conversations["session"] != conversations["generate"]:
            sys.exit("the answers differ")
    millions = ours.num_parameters() / 1e6
    print(f"{millions:.0f} million parameters, {arguments.rounds} rounds, median seconds; equal answers\n")
    print("| turn | transformers' generate | ChatSession | ratio |")
    print("|---|---|---|---|")
    medians = [[statistics.median(seconds) for seconds in zip(*rounds)] for rounds in times.values()]
    for turn, (without, with_cache) in enumerate(zip(*medians), start=1):
        print(f"| {turn} | {without:.2f} | {with_cache:.2f} | {without / with_cache:.1f} |")


if __name__ == "__main__":
    main()
