"""`llava ask` and `llava chat`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from .errors import one_line

CHAT_HELP = "/image PATH adds a picture, /reset forgets, /save FILE writes the conversation, /quit leaves"


def _session(options: argparse.Namespace, limits):
    from modeling_llava.chat_session import ChatSession
    from modeling_llava.inference import EMBEDDED_MODEL, load_for_inference
    from processing_llava import AnyLlavaProcessor

    model, processor = load_for_inference(
        options.model or EMBEDDED_MODEL,
        template=options.template,
        base_model=options.base_model,
        quantization=options.quantization,
        visual_tokens=options.visual_tokens,
    )
    if isinstance(processor, AnyLlavaProcessor):
        processor.image_processor.limits = limits
    return ChatSession(model, processor, system=options.system, compile=options.compile)


def _settings(options: argparse.Namespace) -> dict:
    return {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}


def _answer(options: argparse.Namespace, session, question: str, *, images: list) -> str:
    """Print an answer while it is generated; returns it whole."""
    pieces = []
    for piece in session.ask(question, images=images, **_settings(options)):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def run_ask(options: argparse.Namespace) -> None:
    if len(options.inputs) < 2:
        raise ValueError('got only one argument; expected pictures and a question: llava ask cat.jpg "What is this?"')
    from processing_llava.image_limits import read_limits

    *sources, question = options.inputs
    limits = read_limits(options.image_limit)
    # Pictures are opened before the model, so that a wrong path is answered at once.
    images = [_open_image(source, limits) for source in sources]
    session = _session(options, limits)
    if not options.json:
        _answer(options, session, question, images=images)
        return
    settings = _settings(options)
    answer = "".join(session.ask(question, images=images, **settings))
    record = {"question": question, "images": sources, "answer": answer, "model": options.model or "embedded"}
    took = dataclasses.asdict(session.statistics)
    print(json.dumps(record | settings | took, ensure_ascii=False))


def _open_image(source: str, limits):
    from processing_llava.conversations import ADDRESS
    from processing_llava.image_loading import load_image

    if source == "-":
        return load_image(sys.stdin.buffer, limits=limits)
    # What the user of a terminal types may name any file of theirs.
    return load_image(source if ADDRESS.match(source) else Path(source), limits=limits)


def run_chat(options: argparse.Namespace) -> None:
    from processing_llava.image_limits import read_limits

    limits = read_limits(options.image_limit)
    waiting = [_open_image(source, limits) for source in options.images]
    session = _session(options, limits)
    print(CHAT_HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/image":
                waiting.append(_open_image(argument.strip(), limits))
            elif command == "/reset":
                session.reset()
                waiting = []
            elif command == "/save":
                _save_conversation(session, Path(argument.strip()))
            elif command.startswith("/"):
                print(CHAT_HELP)
            elif line:
                _answer(options, session, line, images=waiting)
                waiting = []
        except (ValueError, OSError) as error:
            print(one_line(error))


def _save_conversation(session, path: Path) -> None:
    turns = []
    for message in session.messages:
        content = message["content"]
        items = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "".join(item["text"] for item in items if item["type"] == "text")
        num_images = sum(item["type"] == "image" for item in items)
        turns.append({"role": message["role"], "text": text, "images": num_images})
    path.write_text(json.dumps(turns, ensure_ascii=False, indent=1) + "\n")
