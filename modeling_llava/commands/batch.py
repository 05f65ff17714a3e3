"""`llava batch`: many pictures, one file of answers that can be gone on with, and what is made of it afterwards."""

import argparse
import hashlib
import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from modeling_llava.batch.answer_file import AnswerFile
from modeling_llava.batch.answering import BatchEngine, Engine, Shard, answer_questions, list_questions
from modeling_llava.batch.inputs import BatchInput, open_rows
from modeling_llava.batch.progress import Progress
from modeling_llava.batch.reports import write_csv, write_gallery
from modeling_llava.batch.tasks import Order
from processing_llava.image_limits import ImageLimits

from .answering import load_model, read_image_limits

ALL_FAILED = 1
"""The exit code where every row that was asked has an error."""
_SETTINGS = (
    "base_model", "vision_tower", "template", "system", "dtype", "quantization", "visual_tokens", "max_new_tokens",
)  # fmt: skip
"""Options that decide answers, and stand in each record if they are given."""


def run_batch(options: argparse.Namespace) -> int:
    """Answer what has no answer yet, and write the reports; returns the exit code.

    Raises:
        ValueError: an option or the input is wrong, or the disk is full; what was answered is in the file.
    """
    _check_files(options)
    order, limits = read_order(options), read_image_limits(options.image_limit)
    shard = Shard.read(options.shard)
    source = BatchInput(
        path=options.input,
        image_folder=options.image_folder,
        follow_links=options.follow_links,
        key_column=options.key_column,
        image_column=options.image_column,
        question_column=options.question_column,
        asks=order.asked == (None,),
        name=options.name,
        split=options.split,
        streaming=options.streaming,
    )
    with AnswerFile(options.out, order, resume=options.resume) as file:
        if options.resume:
            print(
                f"{file.path}: {file.num_records:,} rows are done, {file.num_errors:,} with an error", file=sys.stderr
            )
        # A pass for their number, which also finds what is wrong with the input before a model is loaded.
        left = None
        if not options.streaming:
            left = sum(1 for _ in list_questions(open_rows(source), order, file.done, shard=shard))
        questions = list_questions(open_rows(source), order, file.done, shard=shard)
        first = next(questions, None)
        failed = False
        if first is None:
            print(f"{file.path}: nothing is left to do", file=sys.stderr)
        else:
            engine = _start_engine(options, order, limits)
            progress = Progress(None if left is None else len(file.done) + left, done=len(file.done))
            failed = _answer(file, engine, chain([first], questions), progress)
        if options.csv:
            write_csv(file.path, Path(options.csv))
        if options.gallery:
            write_gallery(file.path, open_rows(source), Path(options.gallery), limits=limits)
        print(f"{file.path}: {file.num_records:,} rows, {file.num_errors:,} with an error")
    return ALL_FAILED if failed else 0


def _check_files(options: argparse.Namespace) -> None:
    """Refuse outputs that would take the place of the input, or of each other; make their folders."""
    files = {"INPUT": options.input, "--out": options.out, "--csv": options.csv, "--gallery": options.gallery}
    places: dict[str, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        other = places.setdefault(os.path.realpath(path), name)
        if other != name:
            raise ValueError(f"got {path!r} as {other} and as {name}; expected a file for each; name another")
        if name in ("--csv", "--gallery"):
            if os.path.isdir(path):
                raise ValueError(f"got {name} {path!r}, which is a folder; expected a file; name one in it")
            Path(path).parent.mkdir(parents=True, exist_ok=True)


def _answer(file: AnswerFile, engine: Engine, questions: Any, progress: Progress) -> bool:
    """Write all answers; returns whether each of them is an error."""
    try:
        for record in answer_questions(questions, engine, file):
            progress.add(is_error="error" in record)
    except BaseException:
        progress.finish(f"{progress.describe()}; stopped: --resume goes on behind what is in {file.path}")
        raise
    progress.finish(progress.describe())
    return progress.num_errors == progress.num_rows


def read_order(options: argparse.Namespace) -> Order:
    """What is asked, from options.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: options that exclude each other, or a file that holds something else.
    """
    questions = list(options.question)
    if options.questions is not None:
        lines = _read_text(options.questions, "a question in each line").splitlines()
        questions += [line.strip() for line in lines if line.strip()]
    if (questions or options.task) and options.question_column is not None:
        raise ValueError("got --question-column beside --question, --questions or --task; expected one of them")
    schema = None
    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.temperature:
        settings |= {"temperature": options.temperature, "seed": options.seed}
    if options.schema is not None:
        schema = read_schema(options.schema)
        # Its digest: a schema may be longer than all answers.
        settings["schema"] = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:16]
    return Order(
        model=options.model or "embedded",
        task=options.task,
        questions=tuple(questions),
        schema=schema,
        settings=settings,
    )


def read_schema(path: str) -> dict[str, Any]:
    """A JSON Schema of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    try:
        schema = json.loads(_read_text(path, "a JSON Schema"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {path}, which is no JSON ({error}); expected a JSON Schema; correct it") from error
    if not isinstance(schema, dict):
        raise ValueError(f"got {path}, which is no JSON object; expected a JSON Schema; correct it")
    return schema


def _read_text(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"got {path}, which is not UTF-8 ({error}); expected {what}; save it as UTF-8") from error


def _start_engine(options: argparse.Namespace, order: Order, limits: ImageLimits) -> Engine:
    if options.engine not in _ENGINES:
        raise ValueError(f"got --engine {options.engine!r}; expected one of {', '.join(_ENGINES)}; choose one")
    return _ENGINES[options.engine](options, order, limits)


def _start_own_engine(options: argparse.Namespace, order: Order, limits: ImageLimits) -> Engine:
    from modeling_llava.inference.answer_requests import AnswerRequest
    from modeling_llava.inference.constraints import Constraint

    # A schema that is none is refused before the model is loaded.
    constraint = None if order.schema is None else Constraint.follow_schema(order.schema)
    request = AnswerRequest(
        [],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        constraint=constraint,
    )
    request.check()
    model, processor = load_model(options, limits)
    return BatchEngine(
        model,
        processor,
        request=request,
        system=options.system,
        shares_pictures=len(order.asked) > 1,
        max_rows=options.max_rows,
        max_cache_tokens=options.max_cache_tokens,
        compile=options.compile,
    )


def _start_vllm(options: argparse.Namespace, order: Order, limits: ImageLimits) -> Engine:
    from modeling_llava.batch.vllm_engine import VllmEngine
    from modeling_llava.inference.loading import EMBEDDED_MODEL
    from processing_llava.processing_llava import AnyLlavaProcessor

    for option in ("base_model", "vision_tower", "quantization", "memory", "visual_tokens", "compile"):
        if getattr(options, option):
            raise ValueError(
                f"got --{option.replace('_', '-')} beside --engine vllm, which decides that itself; expected none; "
                "take it out"
            )
    template = {} if options.template is None else {"template": options.template}
    name = options.model or EMBEDDED_MODEL
    return VllmEngine(
        name,
        AnyLlavaProcessor.from_pretrained(name, **template),
        limits=limits,
        system=options.system,
        dtype=options.dtype,
        schema=order.schema,
        sampling={"max_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed},
    )


_ENGINES = {"own": _start_own_engine, "vllm": _start_vllm}
