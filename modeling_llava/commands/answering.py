"""`llava ask` and `llava chat`."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from contextlib import closing, suppress
from pathlib import Path

from processing_llava.data.conversations import ADDRESS

from .errors import one_line
from .pictures import open_pictures, read_image_limits

CHAT_HELP = (
    "/image PATH adds a picture, /reset forgets, /save FILE writes the conversation, /quit leaves; Ctrl-C stops an "
    "answer"
)
CHAT_ENDS = ("/quit", "/exit", "quit", "exit")
STOPPED = "\n(stopped: question and answer are forgotten, their pictures wait for the next question)"


def run_ask(options: argparse.Namespace) -> None:
    if len(options.inputs) < 2:
        raise ValueError('got only one argument; expected pictures and a question: llava ask cat.jpg "What is this?"')
    *sources, question = options.inputs
    limits = read_image_limits(options.image_limit)
    # Pictures are opened before the model, so that a wrong path is answered at once.
    images = open_pictures(sources, limits=limits, standard_input=True)
    session = _start_session(options, limits)
    if not options.json:
        _print_answer(options, session, question, images=images)
        return
    settings = _settings(options)
    answer = "".join(session.ask(question, images=images, **settings))
    record = {"question": question, "images": sources, "answer": answer, "model": options.model or "embedded"}
    took = dataclasses.asdict(session.statistics)
    print(json.dumps(record | settings | took, ensure_ascii=False))


def run_chat(options: argparse.Namespace) -> None:
    limits = read_image_limits(options.image_limit)
    waiting = open_pictures(options.images, limits=limits)
    session = _start_session(options, limits)
    if sys.stdin.isatty():
        # With readline, input() edits lines and recalls earlier ones, from memory only. Windows has its own.
        with suppress(ImportError):
            import readline  # noqa: F401
    print(CHAT_HELP)
    while (line := _read_line()) is not None:
        command, _, names = line.partition(" ")
        try:
            if command == "/image":
                waiting += open_pictures(_split_names(names), limits=limits)
            elif command == "/reset":
                session.reset()
                waiting = []
            elif command == "/save":
                _save_conversation(session, _split_names(names))
            elif command.startswith("/"):
                print(CHAT_HELP)
            elif line:
                _print_answer(options, session, line, images=waiting)
                waiting = []
        except (ValueError, OSError) as error:
            print(one_line(error))
        except KeyboardInterrupt:
            print(STOPPED)


def _start_session(options: argparse.Namespace, limits):
    from modeling_llava.inference.chat_session import ChatSession
    from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference

    model, processor = load_for_inference(
        options.model or EMBEDDED_MODEL,
        template=options.template,
        base_model=options.base_model,
        vision_tower=options.vision_tower,
        dtype=options.dtype,
        quantization=options.quantization,
        memory=options.memory,
        visual_tokens=options.visual_tokens,
    )
    processor.image_processor.limits = limits
    return ChatSession(model, processor, system=options.system, compile=options.compile)


def _settings(options: argparse.Namespace) -> dict:
    return {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}


def _print_answer(options: argparse.Namespace, session, question: str, *, images: list) -> None:
    """Print an answer while it is generated."""
    # Closed at once where somebody stops it; otherwise the model goes on until the generator is collected.
    with closing(session.ask(question, images=images, **_settings(options))) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
    print()


def _read_line() -> str | None:
    """What is typed next; None at the end. Ctrl-C begins the line anew."""
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
        else:
            return None if line.lower() in CHAT_ENDS else line


def _split_names(text: str) -> list[str]:
    """Names of files as in a shell; one that exists may have spaces without quotes.

    Raises:
        ValueError: if there is none, or a quote is not closed.
    """
    text = text.strip()
    if ADDRESS.match(text) or os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        names = shlex.split(text)
    except ValueError:
        names = []
    if not names:
        raise ValueError(f"got {text!r}; expected the name of a file, in quotes if there are spaces in it")
    return names


def _save_conversation(session, names: list[str]) -> None:
    if len(names) != 1:
        raise ValueError(f"got {len(names)} names; expected one file to write, in quotes if there are spaces in it")
    turns = []
    for message in session.messages:
        content = message["content"]
        items = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "".join(item["text"] for item in items if item["type"] == "text")
        num_images = sum(item["type"] == "image" for item in items)
        turns.append({"role": message["role"], "text": text, "images": num_images})
    Path(os.path.expanduser(names[0])).write_text(json.dumps(turns, ensure_ascii=False, indent=1) + "\n")
