"""`llava export` and `llava push`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory


def add_commands(commands) -> None:
    export = commands.add_parser("export", help="write a folder as it goes to the Hub")
    export.add_argument("source", metavar="DIR", help="model, adapter, Space, or data (folder or file)")
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument("--repo-id", help="for the card: OWNER/NAME on the Hub (default: the name of --out)")
    _add_options(export)
    export.set_defaults(run=run_export)

    push = commands.add_parser("push", help="check a model, adapter, dataset or Space, and send it to the Hub")
    push.add_argument("source", metavar="DIR", help="what `llava export` wrote, or anything that it takes")
    push.add_argument("--repo-id", required=True, help="OWNER/NAME on the Hub")
    push.add_argument("--dry-run", action="store_true", help="only show what would go up")
    push.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=True, help="of a new repository (default: private)"
    )
    push.add_argument("--public", action="store_false", dest="private", help="the same as --no-private")
    push.add_argument("--pull-request", action="store_true", help="propose it to an existing repository")
    _add_options(push)
    push.set_defaults(run=run_push)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", help="any_llava, original or transformers (default: transformers' if possible)")
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


def _export_settings(options: argparse.Namespace):
    from modeling_llava.export.card_facts import CardFacts, read_facts
    from modeling_llava.export.data_manifest import read_manifest
    from modeling_llava.export.export_settings import ExportSettings
    from modeling_llava.yaml_fields import build

    given = {"license": options.license, "base_model": options.base_model}
    given = {name: value for name, value in given.items() if value is not None}
    facts = build(CardFacts, vars(read_facts(options.card)) | given, where="the command line")
    data = [] if options.data_manifest is None else read_manifest(options.data_manifest)
    kept = {name: getattr(options, name) for name in ("repo_id", "layout", "with_code", "keep_card", "image_folder")}
    return ExportSettings(facts=facts, data=data, **kept)


def run_export(options: argparse.Namespace) -> None:
    from modeling_llava.export.repository import export_repository

    _show_exported(export_repository(Path(options.source), Path(options.out), _export_settings(options)))


def run_push(options: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from modeling_llava.export.hub_upload import push_repository
    from modeling_llava.export.repository import prepare_repository

    if "/" not in options.repo_id:
        raise ValueError(f"got repo-id {options.repo_id!r}; expected OWNER/NAME")
    validate_repo_id(options.repo_id)
    with TemporaryDirectory(prefix="llava-push-") as scratch:
        out = Path(scratch) / options.repo_id.split("/")[-1]
        exported = prepare_repository(Path(options.source), out, _export_settings(options))
        _show_exported(exported)
        if options.dry_run:
            print(f"nothing was sent to {options.repo_id}")
            return
        print(
            push_repository(
                exported.folder,
                options.repo_id,
                exported.kind,
                private=options.private,
                pull_request=options.pull_request,
            )
        )


def _show_exported(exported) -> None:
    from modeling_llava.export.hub_upload import list_files

    sizes = list_files(exported.folder)
    for name, num_bytes in sizes.items():
        print(f"{num_bytes:>15,}  {name}")
    layout = f", layout {exported.layout}" if exported.layout else ""
    print(f"{exported.kind}{layout}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    for notice in exported.notices:
        print(f"note: {notice}")
