"""`llava check-data` and `llava train`."""

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path

from .image_limit import add_image_limit


def add_commands(commands) -> None:
    check_data = commands.add_parser("check-data", help="check every record of training data")
    check_data.add_argument("sources", nargs="+", metavar="SOURCE", help="JSON, JSON Lines, folder or Hub dataset")
    check_data.add_argument("--image-folder", help="where image paths start")
    check_data.add_argument(
        "--follow-links", action="store_true", help="symbolic links in the image folder may lead out of it"
    )
    check_data.add_argument("--name", help="configuration of a Hub dataset")
    check_data.add_argument("--split", default="train", help="of a dataset that has several")
    check_data.add_argument("--streaming", action="store_true", help="do not copy the dataset to the disk first")
    check_data.add_argument("--model", help="folder or Hub id of the model to train (default: the embedded model)")
    check_data.add_argument("--template", help="conversation format to use instead of the model's")
    check_data.add_argument("--max-length", type=int, help="longest row in tokens, images counted")
    check_data.add_argument("--too-long", default="drop", help="keep, drop or split longer rows (default: drop)")
    check_data.add_argument(
        "--learn-token", action="append", metavar="TOKEN", help="special token that answers may hold, e.g. '<loc_1>'"
    )
    add_image_limit(check_data)
    check_data.add_argument("--headers-only", action="store_true", help="do not decode the pixels of the images")
    check_data.add_argument(
        "--show", type=int, metavar="N", help="print the first N usable rows, learned text coloured"
    )
    check_data.add_argument("--color", action="store_true", help="colours, even if this is no terminal")
    check_data.add_argument("--html", metavar="FILE", help="write these rows (default: 20) and their images as a page")
    check_data.add_argument("--json", metavar="FILE", help="write the result with every refused record")
    check_data.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all processors)")
    check_data.set_defaults(run=run_check_data)

    train = commands.add_parser("train", help="run a training recipe")
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="set anything of the recipe, e.g. trainer.learning_rate=1e-4 lora.r=8 data.0.path=rows.json",
    )
    train.add_argument("--preview", action="store_true", help="print recipe, parameters, memory and a batch, and stop")
    train.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    train.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in output_dir")
    train.set_defaults(run=run_train)


def run_check_data(options: argparse.Namespace) -> int:
    from modeling_llava.inference import EMBEDDED_MODEL
    from modeling_llava.model_names import load_training_processor
    from processing_llava.data_check import RecordCheck, check_sources
    from processing_llava.data_sources import DataSource
    from processing_llava.image_limits import read_limits
    from processing_llava.preview import make_printable
    from processing_llava.text_encoder import check_learn_tokens

    kept = {name: getattr(options, name) for name in ("image_folder", "follow_links", "name", "split", "streaming")}
    sources = [DataSource(path=path, **kept) for path in options.sources]
    processor = load_training_processor(options.model or EMBEDDED_MODEL, template=options.template)
    processor.image_processor.limits = read_limits(options.image_limit)
    if options.learn_token:
        check_learn_tokens(options.learn_token, processor.tokenizer, image_token=processor.image_token)
        processor.learn_tokens = options.learn_token
    check = RecordCheck(
        processor,
        max_length=options.max_length,
        too_long=options.too_long,
        decode=not options.headers_only,
    )
    for name in filter(None, (options.json, options.html)):
        if any(Path(name).resolve() == Path(path).resolve() for path in options.sources):
            raise ValueError(f"got {name!r} as data and as the file to write; expected another file to write")
        Path(name).touch()  # whether it can be written is known before the work
    if options.show is not None and options.show < 1:
        raise ValueError(f"got --show {options.show}; expected at least 1")
    report = check_sources(sources, check, workers=options.workers, show_progress=sys.stderr.isatty())
    if report.lengths and (options.show or options.html):
        _preview(options, sources, check)
    if options.json:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print(make_printable(report.format_table()))
    if not report.num_records:
        raise ValueError(f"got no records in {', '.join(options.sources)}; expected at least one")
    return int(bool(report.refusals))


def _preview(options: argparse.Namespace, sources: list, check) -> None:
    from processing_llava.data_check import find_usable_rows
    from processing_llava.preview import format_html, format_terminal

    rows = islice(find_usable_rows(sources, check), options.show or 20)
    if options.html:
        Path(options.html).write_text(format_html(rows, check.processor), encoding="utf-8")
        return
    for text in format_terminal(rows, check.processor, color=options.color or sys.stdout.isatty()):
        print(text)


def run_train(options: argparse.Namespace) -> None:
    from modeling_llava.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.settings)
    if options.preview:
        from modeling_llava.training.run_preview import preview

        for section in preview(recipe, color=sys.stdout.isatty()):
            print(section.rstrip() + "\n")
        return
    from accelerate import PartialState

    from modeling_llava.training.run import train

    print(train(recipe, resume=options.resume, overwrite=options.overwrite))
    # A process that ends while torch's threads still hold its tensors can abort, and the launcher calls it a failure.
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
