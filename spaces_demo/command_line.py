"""`llava ...`: ask, chat, batch, demo, serve, assemble, check-data, train, merge, export, push, and what each takes.

What they do is in modeling_llava/commands, which is imported when it runs; what `llava demo` does stands at the end
of this file. The command starts here because importing anything of modeling_llava imports torch and transformers and
registers with them: help and mistakes cost none of that.
Whatever a user can get wrong ends in one line on standard error and exit code 2.
"""

import argparse
import json
import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    # PEFT 0.21 (peft_model.py) and TRL 1.16 (models/utils.py) use names that transformers 5.23 renamed.
    renamed = r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning, module=r"transformers\.modeling_utils")
    try:
        module, _, function = options.run.partition(":")
        return getattr(import_module(module), function)(options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        from modeling_llava.commands.errors import explain

        print(f"llava: {explain(error)}", file=sys.stderr)
        return 2


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llava", description="Ask, assemble, train and share LLaVA models.")
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_answering(commands)
    _add_demo(commands)
    _add_serve(commands)
    _add_models(commands)
    _add_training(commands)
    _add_hub(commands)
    if arguments and arguments[0] in commands.choices:
        # Pictures and questions may stand between options; a parser with commands cannot be told so.
        return commands.choices[arguments[0]].parse_intermixed_args(arguments[1:])
    return parser.parse_args(arguments)


class _PrintVersion(argparse.Action):
    """Reads the version when somebody asks for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        from importlib.metadata import version

        print(f"anyllava {version('anyllava')}")
        parser.exit()


def _add_answering(commands) -> None:
    ask = commands.add_parser("ask", help="ask one question about pictures")
    ask.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="pictures (paths, data URIs, - for standard input), then the question",
    )
    _add_answer_options(ask)
    ask.add_argument("--json", action="store_true", help="print the answer, its settings and what it took as JSON")
    ask.set_defaults(run="modeling_llava.commands.answering:run_ask")

    chat = commands.add_parser("chat", help="talk about pictures")
    chat.add_argument("images", nargs="*", default=[], metavar="IMAGE", help="pictures to start with")
    _add_answer_options(chat)
    chat.set_defaults(run="modeling_llava.commands.answering:run_chat")
    _add_batch(commands)


def _add_batch(commands) -> None:
    batch = commands.add_parser("batch", help="ask the same about many pictures, into a file that outlives a crash")
    batch.add_argument("input", metavar="INPUT", help="folder of pictures, .jsonl, .json, .csv, .parquet, Hub dataset")
    batch.add_argument("--out", required=True, metavar="FILE.jsonl", help="file of answers, one line for each")
    batch.add_argument("--resume", action="store_true", help="go on with FILE.jsonl, if it is there")
    batch.add_argument("--task", help="caption, alt-text or tags; --question asks for it in other words")
    batch.add_argument("--question", action="append", default=[], help="may be repeated: all of each picture")
    batch.add_argument("--questions", metavar="FILE", help="the same, a question in each line")
    batch.add_argument("--schema", metavar="FILE.json", help="JSON Schema that answers follow")
    batch.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts, each for one machine")
    batch.add_argument("--csv", metavar="FILE", help="write the answers as a table afterwards")
    batch.add_argument("--gallery", metavar="FILE", help="write a page of pictures and answers afterwards")
    batch.add_argument("--image-folder", help="where image paths start (default: the folder of INPUT)")
    batch.add_argument(
        "--follow-links", action="store_true", help="symbolic links in the image folder may lead out of it"
    )
    batch.add_argument("--key-column", metavar="NAME", help="default: key, id, question_id, or the number of the row")
    batch.add_argument("--image-column", metavar="NAME", help="default: image, images, file_name or path")
    batch.add_argument("--question-column", metavar="NAME", help="default: question, if no option asks")
    batch.add_argument("--name", help="configuration of a Hub dataset")
    batch.add_argument("--split", default="train", help="split of a dataset that has several")
    batch.add_argument("--streaming", action="store_true", help="do not copy the dataset to the disk first")
    batch.add_argument("--engine", default="own", help="own (default), or vllm, which computes on many GPUs")
    batch.add_argument("--max-rows", type=int, default=16, help="answers at a time (default: 16)")
    batch.add_argument("--max-cache-tokens", type=int, default=16384, help="tokens of all of them (default: 16384)")
    _add_answer_options(batch)
    batch.set_defaults(run="modeling_llava.commands.batch:run_batch")


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: the embedded model)")
    parser.add_argument(
        "--base-model", help="language model under a LoRA, projector or delta that does not say its own"
    )
    parser.add_argument("--vision-tower", help="folder or Hub id, instead of the tower that an original folder names")
    parser.add_argument("--template", help="conversation format to use instead of the model's")
    parser.add_argument("--system", help="system text to use instead of the template's")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest that fits)")
    parser.add_argument("--quantization", help="fewer bits: int8 on a CPU; int4, fp8 or nf4 on a GPU")
    parser.add_argument("--memory", metavar="SIZE", help="what model and answer may take, such as 8GiB (default: all)")
    parser.add_argument("--visual-tokens", type=int, help="most tokens of a picture: faster, and worse answers")
    _add_image_limit(parser)
    parser.add_argument("--compile", action="store_true", help="on a GPU: some minutes at first, then faster")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 answers greedily")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampler")


def _add_demo(commands) -> None:
    demo = commands.add_parser("demo", help="a web page to talk with models about pictures")
    demo.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="folder, adapter or Hub id; give it several times for a menu (default: the embedded model)",
    )
    demo.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    demo.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    demo.add_argument("--queue", type=int, default=32, help="questions that may wait (default: 32)")
    demo.add_argument("--open", action="store_true", help="show the page in the browser")
    demo.add_argument("--share", action="store_true", help="a public address, through a tunnel of Gradio")
    demo.add_argument(
        "--auth", action="append", default=[], metavar="NAME:PASSWORD", help="who may come in; may be repeated"
    )
    demo.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which visitors reach the page, behind a proxy or in a network; may be repeated",
    )
    demo.add_argument("--feedback", metavar="FILE", help="store visitors' opinions of answers as JSON Lines")
    demo.add_argument("--terminal", action="store_true", help="no page: print answers about the example pictures")
    demo.set_defaults(run="spaces_demo.command_line:run_demo")


def _add_serve(commands) -> None:
    serve = commands.add_parser("serve", help="a server that OpenAI's clients talk to")
    serve.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="folder, adapter or Hub id; several are loaded when they are asked for (default: the embedded model)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    serve.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="who may ask; may be repeated (default: LLAVA_API_KEY of the environment)",
    )
    serve.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine; may be repeated"
    )
    serve.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    serve.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest that fits)")
    serve.add_argument("--quantization", help="fewer bits: int8 on a CPU; int4, fp8 or nf4 on a GPU")
    serve.add_argument("--memory", metavar="SIZE", help="what all models and caches may take, such as 8GiB")
    serve.add_argument("--max-rows", type=int, default=16, help="answers at a time, of each model (default: 16)")
    serve.add_argument("--max-cache-tokens", type=int, default=16384, help="of these answers (default: 16384)")
    serve.add_argument("--max-new-tokens", type=int, default=4096, help="most that one may ask for (default: 4096)")
    serve.add_argument("--queue", type=int, default=64, help="requests that may wait (default: 64)")
    serve.add_argument("--timeout", type=float, default=600, help="most seconds of an answer (default: 600)")
    serve.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host whose pictures may be fetched by URL, over https (default: none); may be repeated",
    )
    _add_image_limit(serve)
    serve.set_defaults(run="modeling_llava.commands.serve:run_serve")


def _add_models(commands) -> None:
    assemble = commands.add_parser("assemble", help="make a new LLaVA from a vision tower and a language model")
    assemble.add_argument("--vision-tower", required=True, help="folder or Hub id")
    assemble.add_argument("--language-model", required=True, help="folder or Hub id")
    assemble.add_argument("--projector", default="mlp2x_gelu", help="linear, mlpNx_gelu or identity")
    assemble.add_argument("--template", required=True, help="conversation format, e.g. vicuna_v1")
    assemble.add_argument(
        "--vision-feature-layer", type=int, nargs="+", default=[-2], help="hidden state that is projected, or several"
    )
    assemble.add_argument("--image-aspect-ratio", default="pad", help="pad, square or anyres")
    assemble.add_argument(
        "--image-grid-pinpoints",
        type=_parse_size,
        nargs="+",
        metavar="HEIGHTxWIDTH",
        help="with anyres: sizes in pixels that a picture may be cut into tiles at",
    )
    assemble.add_argument("--patch-merge-type", default="flat", help="flat, spatial or spatial_unpad, for tiles")
    assemble.add_argument("--seed", type=int, default=0, help="seed of the projector's initial weights")
    assemble.add_argument("--out", required=True, help="folder to write")
    assemble.set_defaults(run="modeling_llava.commands.models:run_assemble")

    merge = commands.add_parser("merge", help="make one model of an adapter and its base")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id")
    merge.add_argument("--out", required=True, help="folder to write")
    merge.add_argument("--base-model", help="folder or Hub id to use instead of the one that the adapter names")
    merge.add_argument("--base-bits", type=int, help="4 if it was trained on a 4-bit base (default: see its record)")
    merge.set_defaults(run="modeling_llava.commands.models:run_merge")

    doctor = commands.add_parser("doctor", help="versions, device, cached models, and the memory that a model needs")
    doctor.add_argument("--parameters", type=float, default=7e9, help="size of a model in parameters, e.g. 7e9")
    doctor.add_argument("--model", help="folder or Hub id; nothing but its config.json is read")
    doctor.add_argument("--images", type=int, default=1, help="images in each prompt")
    doctor.add_argument("--new-tokens", type=int, default=256, help="tokens of each answer")
    doctor.add_argument("--rows", type=int, default=1, help="answers at a time")
    doctor.add_argument("--quantization", help="fewer bits: int8 on a CPU; int4, fp8 or nf4 on a GPU")
    doctor.add_argument("--visual-tokens", type=int, help="most tokens of a picture that the model sees")
    doctor.set_defaults(run="modeling_llava.commands.doctor:run_doctor")


def _parse_size(text: str) -> list[int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a height and a width in pixels, e.g. 336x672")
    return [int(height), int(width)]


def _add_training(commands) -> None:
    check_data = commands.add_parser("check-data", help="check every record of training data")
    check_data.add_argument("sources", nargs="+", metavar="SOURCE", help="JSON, JSON Lines, folder or Hub dataset")
    check_data.add_argument("--image-folder", help="where image paths start")
    check_data.add_argument(
        "--follow-links", action="store_true", help="symbolic links in the image folder may lead out of it"
    )
    check_data.add_argument("--name", help="configuration of a Hub dataset")
    check_data.add_argument("--split", default="train", help="split of a dataset that has several")
    check_data.add_argument("--streaming", action="store_true", help="do not copy the dataset to the disk first")
    check_data.add_argument("--model", help="folder or Hub id of the model to train (default: the embedded model)")
    check_data.add_argument("--template", help="conversation format to use instead of the model's")
    check_data.add_argument("--max-length", type=int, help="longest row in tokens, images counted")
    check_data.add_argument("--too-long", default="drop", help="keep, drop or split longer rows (default: drop)")
    check_data.add_argument(
        "--learn-token", action="append", metavar="TOKEN", help="special token that answers may hold, e.g. '<loc_1>'"
    )
    _add_image_limit(check_data)
    check_data.add_argument("--headers-only", action="store_true", help="do not decode the pixels of the images")
    check_data.add_argument(
        "--show", type=int, metavar="N", help="print the first N usable rows, learned text coloured"
    )
    check_data.add_argument("--color", action="store_true", help="colours, even if this is no terminal")
    check_data.add_argument("--html", metavar="FILE", help="write these rows (default: 20) and their images as a page")
    check_data.add_argument("--json", metavar="FILE", help="write the result with every refused record")
    check_data.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    check_data.set_defaults(run="modeling_llava.commands.models:run_check_data")

    train = commands.add_parser("train", help="run a training recipe")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument(
        "settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="set anything of the recipe, e.g. trainer.learning_rate=1e-4 lora.r=8 data.0.path=rows.json",
    )
    train.add_argument("--preview", action="store_true", help="print recipe, parameters, memory and a batch, and stop")
    train.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    train.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in output_dir")
    train.set_defaults(run="modeling_llava.commands.models:run_train")


def _add_hub(commands) -> None:
    export = commands.add_parser(
        "export", help="write a folder as it goes to the Hub, or as llama.cpp or vLLM takes it"
    )
    export.add_argument("source", metavar="DIR", help="model, adapter, Space, or data (folder or file)")
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument("--repo-id", help="for the card: OWNER/NAME on the Hub (default: the name of --out)")
    export.add_argument(
        "--for",
        dest="engine",
        metavar="ENGINE",
        help="vllm: an adapter as OUT/base and OUT/adapter, for vLLM",
    )
    export.add_argument("--quantize", help="with --layout gguf: q8_0 or q4_k_m, for the language model")
    export.add_argument(
        "--for-llama-cpp-with-issue-25814",
        action="store_true",
        help="with --layout gguf and a CLIP tower: files that are right, but for one patch, in a llama.cpp with that "
        "fault alone",
    )
    _add_export_options(export)
    export.set_defaults(run="modeling_llava.commands.models:run_export")

    push = commands.add_parser("push", help="check a model, adapter, dataset or Space, and send it to the Hub")
    push.add_argument("source", metavar="DIR", help="what `llava export` wrote, or anything that it takes")
    push.add_argument("--repo-id", required=True, help="OWNER/NAME on the Hub")
    push.add_argument("--dry-run", action="store_true", help="only show what would go up")
    push.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=True, help="a new repository is private (default)"
    )
    push.add_argument("--public", action="store_false", dest="private", help="the same as --no-private")
    push.add_argument("--pull-request", action="store_true", help="propose it to an existing repository")
    _add_export_options(push)
    push.set_defaults(run="modeling_llava.commands.models:run_push")


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", help="any_llava, original, transformers (the default, if possible), or gguf, for llama.cpp"
    )
    parser.add_argument(
        "--with-code",
        action=argparse.BooleanOptionalAction,
        help="add the code to load it without this package (default: for layout any_llava)",
    )
    parser.add_argument("--license", help="identifier of the Hub, e.g. apache-2.0")
    parser.add_argument("--base-model", action="append", help="Hub id of what it was made from; may be repeated")
    parser.add_argument("--card", help="YAML file of facts for the card, or the name of a published model")
    parser.add_argument("--keep-card", action="store_true", help="take the README.md that is there")
    parser.add_argument("--data-manifest", help="YAML file that says where the training data comes from")
    parser.add_argument("--image-folder", help="where image paths of a dataset start")


def _add_image_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="refuse pictures above it, e.g. max_pixels=150000000 or max_aspect_ratio=40; again for another limit",
    )


def run_demo(options: argparse.Namespace) -> None:
    """Serve the page until the process ends.

    Raises:
        ValueError: if a model cannot be loaded or an option is wrong.
    """
    # Before anything that imports Gradio or huggingface_hub.
    from . import telemetry  # noqa: F401

    # isort: split
    from .models import DemoMenu

    auth = [tuple(pair.split(":", 1)) for pair in options.auth]
    if any(len(pair) != 2 or not all(pair) for pair in auth):
        raise ValueError("got --auth without a name or a password; expected NAME:PASSWORD")
    menu = DemoMenu(options.model, device=options.device)
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
