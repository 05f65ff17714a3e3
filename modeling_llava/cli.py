"""`llava ...`: ask, chat, demo, doctor, assemble, train.

Imports live inside the commands: a command needs only its own extra. Whatever a user can get wrong ends in one line
on standard error and exit code 2.
"""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"llava: {_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"llava: {_missing_extra(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    return 0


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

    train = commands.add_parser("train", help="run a training recipe")
    train.add_argument("recipe", metavar="RECIPE.yaml")
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


def _train(options: argparse.Namespace) -> None:
    from modeling_llava.training.recipe import read_recipe
    from modeling_llava.training.run import train

    print(train(read_recipe(options.recipe)))


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
