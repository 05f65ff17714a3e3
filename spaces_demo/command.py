"""`llava demo`: the page on this machine, or the examples in the terminal."""

import argparse
import json
import re
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="folder, adapter or Hub id; give it several times for a menu (default: the embedded model)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--queue", type=int, default=32, help="questions that may wait (default: 32)")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    parser.add_argument("--share", action="store_true", help="a public address, through a tunnel of Gradio")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="NAME:PASSWORD", help="who may come in; may be repeated"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which visitors reach the page, behind a proxy or in a network; may be repeated",
    )
    parser.add_argument("--feedback", metavar="FILE", help="store visitors' opinions of answers as JSON Lines")
    parser.add_argument("--terminal", action="store_true", help="no page: print answers about the example pictures")


def run(options: argparse.Namespace) -> None:
    """Serve the page until the process ends.

    Raises:
        ValueError: if a model cannot be loaded or an option is wrong.
    """
    # Before anything that imports Gradio or huggingface_hub.
    from . import telemetry  # noqa: F401

    # isort: split
    from .models import ModelMenu

    auth = [tuple(pair.split(":", 1)) for pair in options.auth]
    if any(len(pair) != 2 or not all(pair) for pair in auth):
        raise ValueError("got --auth without a name or a password; expected NAME:PASSWORD")
    menu = ModelMenu(options.model, device=options.device)
    if options.terminal:
        answer_examples(menu)
        return

    from .app import launch
    from .feedback import FeedbackFile

    launch(
        menu,
        feedback=FeedbackFile(options.feedback) if options.feedback else None,
        queue=options.queue,
        port=options.port,
        share=options.share,
        auth=auth or None,
        allow_hosts=[_check_host(name) for name in options.allow_host],
        open_browser=options.open,
    )


def _check_host(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
        raise ValueError(f"got --allow-host {name!r}; expected a name without scheme, port and path: demo.example.org")
    return name.lower().removesuffix(".")


def answer_examples(menu) -> None:
    """Print what the first model of a menu answers about the example pictures."""
    from .models import Settings

    folder = Path(__file__).parent / "examples"
    for example in json.loads((folder / "examples.json").read_text()):
        picture = {"type": "image", "image": folder / example["image"]}
        question = {"role": "user", "content": [picture, {"type": "text", "text": example["question"]}]}
        *_, (answer, _) = menu.answer(menu.labels[0], [question], Settings())
        print(f"{example['image']}: {example['question']} {answer}", flush=True)
