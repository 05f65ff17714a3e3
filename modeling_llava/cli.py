"""`llava ...`: ask, chat, demo, doctor, assemble, check-data, train.

Imports live inside the commands: a command needs only its own extra. Whatever a user can get wrong ends in one line
on standard error and exit code 2.
"""

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path

PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What a path that a user gave can cause."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, *PATH_ERRORS) as error:
        print(f"llava: {_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"llava: {_missing_extra(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava", description="Ask, chat with, assemble and train LLaVA models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="ask one question about pictures")
    ask.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="pictures (paths, data URIs, - for standard input), then the question",
    )
    _add_answer_options(ask)
    ask.add_argument("--json", action="store_true", help="print the answer and how it came about as JSON")
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="talk about pictures")
    chat.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to start with")
    _add_answer_options(chat)
    chat.set_defaults(run=_chat)

    demo = commands.add_parser("demo", help="ask the embedded model about the example pictures, then chat")
    _add_answer_options(demo)
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="versions, device, memory, cached models")
    doctor.add_argument("--parameters", type=float, default=7e9, help="size of a model in parameters, e.g. 7e9")
    doctor.set_defaults(run=_doctor)

    assemble = commands.add_parser("assemble", help="make a new LLaVA from a vision tower and a language model")
    assemble.add_argument("--vision-tower", required=True, help="folder or Hub id")
    assemble.add_argument("--language-model", required=True, help="folder or Hub id")
    assemble.add_argument("--projector", default="mlp2x_gelu", help="linear, mlpNx_gelu or identity")
    assemble.add_argument("--template", required=True, help="conversation format, e.g. vicuna_v1")
    assemble.add_argument("--vision-feature-layer", type=int, default=-2, help="hidden state that is projected")
    assemble.add_argument("--image-aspect-ratio", default="pad", help="pad or square")
    assemble.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    assemble.add_argument("--out", required=True, help="folder to write")
    assemble.set_defaults(run=_assemble)

    check_data = commands.add_parser("check-data", help="check every record of training data")
    check_data.add_argument("sources", nargs="+", metavar="SOURCE", help="JSON, JSON Lines, folder or Hub dataset")
    check_data.add_argument("--image-folder", help="where image paths start")
    check_data.add_argument("--name", help="configuration of a Hub dataset")
    check_data.add_argument("--split", default="train", help="of a dataset that has several")
    check_data.add_argument("--streaming", action="store_true", help="do not copy the dataset to the disk first")
    check_data.add_argument("--model", help="folder or Hub id of the model to train (default: the embedded model)")
    check_data.add_argument("--template", help="conversation format to use instead of the model's")
    check_data.add_argument("--max-length", type=int, help="longest row in tokens, images counted")
    check_data.add_argument("--too-long", default="drop", help="keep, drop or split longer rows (default: drop)")
    check_data.add_argument("--headers-only", action="store_true", help="do not decode the pixels of the images")
    check_data.add_argument(
        "--show", type=int, metavar="N", help="print the first N usable rows, learned text coloured"
    )
    check_data.add_argument("--color", action="store_true", help="colours, even if this is no terminal")
    check_data.add_argument("--html", metavar="FILE", help="write these rows (default: 20) and their images as a page")
    check_data.add_argument("--json", metavar="FILE", help="write the result with every refused record")
    check_data.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all processors)")
    check_data.set_defaults(run=_check_data)

    train = commands.add_parser("train", help="run a training recipe")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    train.set_defaults(run=_train)
    return parser


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: the embedded model)")
    parser.add_argument(
        "--base-model", help="language model under a LoRA, projector or delta that does not say its own"
    )
    parser.add_argument("--template", help="conversation format to use instead of the model's")
    parser.add_argument("--system", help="system text to use instead of the template's")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 gives the likeliest answer")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def _session(options: argparse.Namespace):
    from modeling_llava.inference import EMBEDDED_MODEL, ChatSession, load_for_inference

    model, processor = load_for_inference(
        options.model or EMBEDDED_MODEL, template=options.template, base_model=options.base_model
    )
    return ChatSession(model, processor, system=options.system)


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


def _ask(options: argparse.Namespace) -> None:
    if len(options.inputs) < 2:
        raise ValueError('got only one argument; expected pictures and a question: llava ask cat.jpg "What is this?"')
    *sources, question = options.inputs
    # Pictures are opened before the model, so that a wrong path is answered at once.
    images = [_open_image(source) for source in sources]
    session = _session(options)
    if not options.json:
        _answer(options, session, question, images=images)
        return
    settings = _settings(options)
    answer = "".join(session.ask(question, images=images, **settings))
    record = {"question": question, "images": sources, "answer": answer, "model": options.model or "embedded"}
    print(json.dumps(record | settings, ensure_ascii=False))


def _open_image(source: str):
    from processing_llava.image_loading import load_image

    return load_image(sys.stdin.buffer.read() if source == "-" else source)


CHAT_HELP = "/image PATH adds a picture, /reset forgets, /save FILE writes the conversation, /quit leaves"


def _chat(options: argparse.Namespace) -> None:
    waiting = [_open_image(source) for source in options.images]
    session = _session(options)
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
                waiting.append(_open_image(argument.strip()))
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
            print(_one_line(error))


def _save_conversation(session, path: Path) -> None:
    turns = []
    for message in session.messages:
        content = message["content"]
        items = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "".join(item["text"] for item in items if item["type"] == "text")
        num_images = sum(item["type"] == "image" for item in items)
        turns.append({"role": message["role"], "text": text, "images": num_images})
    path.write_text(json.dumps(turns, ensure_ascii=False, indent=1) + "\n")


def _demo(options: argparse.Namespace) -> None:
    import spaces_demo

    folder = Path(spaces_demo.__file__).parent / "examples"
    session = _session(options)
    for example in json.loads((folder / "examples.json").read_text()):
        print(f"{example['image']}: {example['question']} ", end="")
        session.reset()
        _answer(options, session, example["question"], images=[folder / example["image"]])
    if sys.stdin.isatty():
        options.images = []
        _chat(options)


def _doctor(options: argparse.Namespace) -> None:
    from modeling_llava.doctor import report

    print(report(num_parameters=options.parameters))


def _assemble(options: argparse.Namespace) -> None:
    from modeling_llava.assemble import assemble

    model, processor = assemble(
        vision_tower=options.vision_tower,
        language_model=options.language_model,
        template=options.template,
        projector_type=options.projector,
        image_aspect_ratio=options.image_aspect_ratio,
        vision_feature_layer=options.vision_feature_layer,
        seed=options.seed,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{options.out}: {model.num_parameters():,} parameters")


def _check_data(options: argparse.Namespace) -> int:
    from processing_llava.data_check import RecordCheck, check_sources
    from processing_llava.data_sources import DataSource
    from processing_llava.preview import make_printable

    kept = {name: getattr(options, name) for name in ("image_folder", "name", "split", "streaming")}
    sources = [DataSource(path=path, **kept) for path in options.sources]
    check = RecordCheck(
        _load_processor(options),
        max_length=options.max_length,
        too_long=options.too_long,
        decode=not options.headers_only,
    )
    if options.json:
        Path(options.json).touch()  # whether it can be written is known before the work
    report = check_sources(sources, check, workers=options.workers, show_progress=sys.stderr.isatty())
    if report.lengths and (options.show or options.html):
        _preview(options, sources, check)
    if options.json:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print(make_printable(report.format_table()))
    return int(bool(report.refusals))


def _load_processor(options: argparse.Namespace):
    from transformers import AutoProcessor

    from modeling_llava.inference import EMBEDDED_MODEL
    from processing_llava import AnyLlavaProcessor

    chosen = {} if options.template is None else {"template": options.template}
    try:
        processor = AutoProcessor.from_pretrained(options.model or EMBEDDED_MODEL, **chosen)
    except OSError as error:
        raise ValueError(f"got model {options.model!r}; expected a folder or a Hub id of a LLaVA: {error}") from error
    if not isinstance(processor, AnyLlavaProcessor):
        raise ValueError(f"got model {options.model!r} of transformers' own layout; expected one that trains here")
    return processor


def _preview(options: argparse.Namespace, sources: list, check) -> None:
    from processing_llava.data_check import find_usable_rows
    from processing_llava.preview import format_html, format_terminal

    rows = islice(find_usable_rows(sources, check), options.show or 20)
    if options.html:
        Path(options.html).write_text(format_html(rows, check.processor), encoding="utf-8")
        return
    for text in format_terminal(rows, check.processor, color=options.color or sys.stdout.isatty()):
        print(text)


def _train(options: argparse.Namespace) -> None:
    from modeling_llava.training.recipe import read_recipe
    from modeling_llava.training.run import train

    print(train(read_recipe(options.recipe), resume=options.resume))


EXTRAS = {
    "trl": "train",
    "peft": "train",
    "datasets": "train",
    "accelerate": "train",
    "yaml": "train",
    "gradio": "demo",
}


def _missing_extra(error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        raise error
    return f"{package} is not installed; this command needs it: pip install 'anyllava[{EXTRAS[package]}]'"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
