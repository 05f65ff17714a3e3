"""`llava export` and `llava push`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory


def run_export(options: argparse.Namespace) -> None:
    from modeling_llava.export.repository import export_repository

    _show_exported(export_repository(_find_source(options), Path(options.out), _export_settings(options)))


def run_push(options: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from modeling_llava.export.hub_upload import push_repository
    from modeling_llava.export.repository import prepare_repository

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
    from modeling_llava.export.card_facts import CardFacts, read_facts
    from modeling_llava.export.export_settings import ExportSettings
    from modeling_llava.records.data_manifest import read_manifest
    from modeling_llava.records.yaml_fields import build

    given = {"license": options.license, "base_model": options.base_model}
    given = {name: value for name, value in given.items() if value is not None}
    facts = build(CardFacts, vars(read_facts(options.card)) | given, where="the command line")
    data = [] if options.data_manifest is None else read_manifest(options.data_manifest)
    kept = {name: getattr(options, name) for name in ("repo_id", "layout", "with_code", "keep_card", "image_folder")}
    return ExportSettings(facts=facts, data=data, **kept)


def _show_exported(exported) -> None:
    from modeling_llava.export.hub_upload import list_files

    sizes = list_files(exported.folder)
    for name, num_bytes in sizes.items():
        print(f"{num_bytes:>15,}  {name}")
    layout = f", layout {exported.layout}" if exported.layout else ""
    print(f"{exported.kind}{layout}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    for notice in exported.notices:
        print(f"note: {notice}")
