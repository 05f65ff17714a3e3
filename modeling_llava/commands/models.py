"""`llava assemble`, `check-data`, `train`, `merge`, `export` and `push`: from parts and rows to a model on the Hub."""

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory


def run_assemble(options: argparse.Namespace) -> None:
    from modeling_llava.assemble import assemble

    layers = options.vision_feature_layer
    model, processor = assemble(
        vision_tower=options.vision_tower,
        language_model=options.language_model,
        template=options.template,
        projector_type=options.projector,
        image_aspect_ratio=options.image_aspect_ratio,
        image_grid_pinpoints=options.image_grid_pinpoints,
        patch_merge_type=options.patch_merge_type,
        vision_feature_layer=layers if len(layers) > 1 else layers[0],
        seed=options.seed,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{options.out}: {model.num_parameters():,} parameters")


def run_check_data(options: argparse.Namespace) -> int:
    from modeling_llava.checkpoints.model_names import load_training_processor
    from modeling_llava.inference.loading import EMBEDDED_MODEL
    from processing_llava.data.data_check import RecordCheck, check_sources
    from processing_llava.data.data_sources import PICTURE_LIMITS, DataSource
    from processing_llava.data.preview import make_printable
    from processing_llava.prompt_ids import check_learn_tokens

    from .answering import name_option, read_image_limits

    kept = {name: getattr(options, name) for name in ("image_folder", "follow_links", "name", "split", "streaming")}
    sources = [DataSource(path=path, **kept) for path in options.sources]
    processor = load_training_processor(options.model or EMBEDDED_MODEL, template=options.template)
    processor.image_processor.limits = read_image_limits(options.image_limit, PICTURE_LIMITS)
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
    print(make_printable(name_option(report.format_table())))
    if not report.num_records:
        raise ValueError(f"got no records in {', '.join(options.sources)}; expected at least one")
    return int(bool(report.refusals))


def _preview(options: argparse.Namespace, sources: list, check) -> None:
    from processing_llava.data.data_check import find_usable_rows
    from processing_llava.data.preview import format_html, format_terminal

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


def run_merge(options: argparse.Namespace) -> None:
    from modeling_llava.export.merged_adapter import merge_adapter

    report = merge_adapter(
        options.adapter, Path(options.out), base_model=options.base_model, base_bits=options.base_bits
    )
    print(f"{options.out}: {report}")


def run_export(options: argparse.Namespace) -> None:
    if options.layout == "gguf":
        _show_exported(_export_gguf(options))
        return
    if options.quantize is not None or options.for_llama_cpp_with_issue_25814:
        raise ValueError("got an option for GGUF files without --layout gguf; expected both or neither: add it")
    if options.engine is not None:
        _show_exported(_export_for_vllm(options))
        return
    from modeling_llava.export.repository import export_repository

    _show_exported(export_repository(_find_source(options), Path(options.out), _export_settings(options)))


_OF_REPOSITORIES = ("with_code", "card", "keep_card", "data_manifest", "image_folder")
"""Options of an export that say something about a repository of the Hub alone."""


def _refuse_options(options: argparse.Namespace, names: Iterable[str], *, beside: str, expected: str) -> None:
    for name in names:
        if getattr(options, name):
            raise ValueError(
                f"got --{name.replace('_', '-')} with {beside}, where it has no effect; expected {expected} or none: "
                "leave it out"
            )


def _export_gguf(options: argparse.Namespace):
    from modeling_llava.export.gguf_files import GgufSettings, export_gguf

    if options.engine is not None:
        raise ValueError(f"got --layout gguf and --for {options.engine}; expected one of them")
    names = (*_OF_REPOSITORIES, "base_model")
    _refuse_options(options, names, beside="--layout gguf", expected="--repo-id, --license, --quantize")
    out = Path(options.out)
    settings = GgufSettings(
        name=(options.repo_id or out.resolve().name).split("/")[-1],
        quantize=options.quantize,
        for_issue_25814=options.for_llama_cpp_with_issue_25814,
        license=options.license,
    )
    return export_gguf(_find_source(options), out, settings)


def _export_for_vllm(options: argparse.Namespace):
    from modeling_llava.export.vllm_adapter import export_for_vllm

    if options.engine != "vllm":
        raise ValueError(f"got --for {options.engine}; expected vllm")
    names = (*_OF_REPOSITORIES, "layout", "license", "repo_id")
    _refuse_options(options, names, beside="--for vllm", expected="--base-model")
    bases = options.base_model or [None]
    if len(bases) > 1:
        raise ValueError(f"got --base-model {' and '.join(bases)} with --for vllm; expected one base")
    return export_for_vllm(_find_source(options), Path(options.out), base_model=bases[0])


def run_push(options: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from modeling_llava.export.hub_upload import push_repository
    from modeling_llava.export.repository import prepare_repository

    if options.layout == "gguf":
        raise ValueError(
            "got --layout gguf for push; expected another layout: write the files with llava export, and send "
            "them with hf upload"
        )
    if "/" not in options.repo_id:
        raise ValueError(f"got repo-id {options.repo_id!r}; expected OWNER/NAME")
    validate_repo_id(options.repo_id)
    with TemporaryDirectory(prefix="llava-push-") as scratch:
        out = Path(scratch) / options.repo_id.split("/")[-1]
        exported = prepare_repository(_find_source(options), out, _export_settings(options))
        _show_exported(exported)
        if options.dry_run:
            print(f"nothing was sent to {options.repo_id}")
            return
        sent = push_repository(exported, options.repo_id, private=options.private, pull_request=options.pull_request)
        print(sent)


def _find_source(options: argparse.Namespace) -> Path:
    from processing_llava.original.original_folder import find_installed

    return Path(find_installed(options.source))


def _export_settings(options: argparse.Namespace):
    from modeling_llava.export.export_settings import CardFacts, ExportSettings, read_facts
    from modeling_llava.records.training_record import read_manifest
    from modeling_llava.records.yaml_fields import build

    given = {"license": options.license, "base_model": options.base_model}
    given = {name: value for name, value in given.items() if value is not None}
    facts = build(CardFacts, vars(read_facts(options.card)) | given, where="the command line")
    data = [] if options.data_manifest is None else read_manifest(options.data_manifest)
    kept = {name: getattr(options, name) for name in ("repo_id", "layout", "with_code", "keep_card", "image_folder")}
    return ExportSettings(facts=facts, data=data, **kept)


def _show_exported(exported) -> None:
    from modeling_llava.export.repository import list_files

    sizes = list_files(exported.folder)
    for name, num_bytes in sizes.items():
        print(f"{num_bytes:>15,}  {name}")
    layout = f", layout {exported.layout}" if exported.layout else ""
    print(f"{exported.kind}{layout}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    for notice in exported.notices:
        print(f"note: {notice}")
