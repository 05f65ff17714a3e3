"""What would make a repository useless, dishonest or dangerous, found before anything leaves this machine."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_llava.records.data_manifest import (
    BASE_MODEL_RELATIONS,
    LICENSES,
    PIPELINE_TAGS,
    SPACE_COLORS,
    SPACE_SDKS,
)

MAX_FILE_BYTES = 500_000_000_000
"""Beyond it the Hub refuses a file: https://huggingface.co/docs/hub/storage-limits."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TEXT_FILES = (".md", ".json", ".txt", ".py", ".yaml", ".yml", ".csv", ".jinja", ".cfg", ".toml")
# BibTeX has {{ after =, where it keeps capitals.
_TEMPLATE_MARK = re.compile(r"\{\{(?=\s)|(?<![={\"])(?<!= )\{\{|\{%|\[More Information Needed\]|\[optional\]|TODO")
# Addresses of the web are matched first, so that no path is found inside them.
_PATH_IN_TEXT = re.compile(
    r"""(?!file:)\b[A-Za-z][\w+.-]*://\S+
    | (?P<path> (?<![\w/.:~<])(?:~?/|[A-Za-z]:[/\\])[\w.@+-]+[/\\][\w.@+/\\-]*
    | \bfile://[\w.@+:/\\-]+
    | (?<!\\)\\\\[\w.-]+\\[\w.$@+\\-]+ )""",
    flags=re.VERBOSE,
)
_RELATIVE_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,4})?|multilingual|code")


def check_repository(folder: Path, kind: str) -> None:
    """Refuse a folder that may not go up.

    Args:
        kind: "model", "adapter", "dataset" or "space".

    Raises:
        ValueError: with every reason.
    """
    problems = list(find_problems(folder, kind))
    if problems:
        raise ValueError(f"got {folder}, which may not go up: {'; '.join(problems)}; correct that first")


def find_problems(folder: Path, kind: str) -> Iterator[str]:
    """Every reason why a folder may not go up."""
    yield from _find_file_problems(folder)
    yield from _CONTENT_CHECKS[kind](folder)
    card = folder / "README.md"
    if not card.is_file():
        yield "README.md is missing"
        return
    try:
        metadata, text = read_card(card)
    except yaml.YAMLError as error:
        yield f"the metadata of README.md is not YAML ({error})"
        return
    if not isinstance(metadata, dict):
        yield "README.md does not begin with metadata between two lines of ---"
        return
    yield from _find_text_problems(folder, text)
    yield from _find_license_problems(folder, metadata)
    yield from _METADATA_CHECKS[kind](folder, metadata)
    for name in ("base_model", "datasets", "models"):
        yield from _find_id_problems(metadata, name)


def read_card(path: Path) -> tuple[Any, str]:
    """The metadata of a README.md, None if it has none, and the text after them."""
    text = path.read_text(encoding="utf-8")
    block = REGEX_YAML_BLOCK.search(text)
    return (yaml.safe_load(block.group(2)), text[block.end() :]) if block else (None, text)


def is_absolute_path(value: str) -> bool:
    """Whether a text is a path of somebody's machine."""
    paths = PurePosixPath(value), PureWindowsPath(value)
    return "\n" not in value and any(path.is_absolute() and len(path.parts) > 2 for path in paths)


def find_paths(text: str) -> list[str]:
    """Paths of somebody's machine: the text itself, or what stands in it."""
    if is_absolute_path(text):
        return [text]
    return [match["path"] for match in _PATH_IN_TEXT.finditer(text) if match["path"]]


def cut_paths(text: str) -> str:
    """The text with the last part alone of every path that `find_paths` finds."""
    if is_absolute_path(text):
        return _last_part(text)
    return _PATH_IN_TEXT.sub(lambda match: _last_part(match["path"]) if match["path"] else match.group(), text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _find_file_problems(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            size, limit = f"{path.stat().st_size:,}", f"{MAX_FILE_BYTES:,}"
            yield f"{name} has {size} bytes, and the Hub takes at most {limit} in one file: split it"
        if path.suffix in _PICKLES:
            yield f"{name} can hold code that runs when it is loaded; save it as safetensors"
        if path.name == ".env":
            yield f"{name} usually holds secrets"
        if path.suffix in _TEXT_FILES and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            if ACCESS_TOKEN.search(text):
                yield f"{name} holds an access token"
            if path.suffix == ".json":
                yield from (
                    f"{name} holds the path {found} of this machine" for found in _find_json_paths(json.loads(text))
                )


def _find_json_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _find_json_paths(item)
    elif isinstance(value, str):
        yield from find_paths(value)


def _find_text_problems(folder: Path, text: str) -> Iterator[str]:
    for mark in dict.fromkeys(_TEMPLATE_MARK.findall(text)):
        yield f"README.md holds {mark!r}, which a template left behind"
    for path in find_paths(text):
        yield f"README.md holds the path {path} of this machine"
    for link in _RELATIVE_LINK.findall(text):
        if not (folder / link).exists():
            yield f"README.md links {link}, and there is no such file"


def _find_license_problems(folder: Path, metadata: dict[str, Any]) -> Iterator[str]:
    license_id = metadata.get("license")
    if license_id not in LICENSES:
        yield f"license is {license_id!r}, which the Hub does not know"
    has_terms = "license_link" in metadata or any(folder.glob("LICENSE*"))
    if license_id == "other" and not ("license_name" in metadata and has_terms):
        yield "license is 'other' without license_name, and license_link or a file LICENSE"


def _find_id_problems(metadata: dict[str, Any], name: str) -> Iterator[str]:
    ids = metadata.get(name) or []
    for repo_id in [ids] if isinstance(ids, str) else ids:
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            yield f"{name} is {repo_id!r}, which is no id of the Hub"


def _check_model_metadata(folder: Path, metadata: dict[str, Any]) -> Iterator[str]:
    if metadata.get("pipeline_tag") not in PIPELINE_TAGS:
        yield f"pipeline_tag is {metadata.get('pipeline_tag')!r}, which the Hub does not know"
    if not metadata.get("library_name"):
        yield "library_name is missing"
    if not metadata.get("base_model"):
        yield "base_model is missing"
    if metadata.get("base_model_relation") not in BASE_MODEL_RELATIONS:
        relation = metadata.get("base_model_relation")
        yield f"base_model_relation is {relation!r}; it can be {', '.join(BASE_MODEL_RELATIONS)}"
    yield from _find_language_problems(metadata)
    for entry in metadata.get("model-index") or []:
        for result in entry["results"]:
            if not (result.get("source") or {}).get("url"):
                yield f"model-index has a figure of {result['dataset']['name']} without its source"


def _check_adapter_metadata(folder: Path, metadata: dict[str, Any]) -> Iterator[str]:
    yield from _check_model_metadata(folder, metadata)
    if metadata.get("base_model_relation") != "adapter":
        yield f"base_model_relation is {metadata.get('base_model_relation')!r} for an adapter"
    path = folder / "adapter_config.json"
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None
    if metadata.get("base_model") not in (base, [base]):
        yield f"base_model is {metadata.get('base_model')!r}, and adapter_config.json says {base!r}"


def _check_dataset_metadata(folder: Path, metadata: dict[str, Any]) -> Iterator[str]:
    yield from _find_language_problems(metadata)
    for config in metadata.get("configs") or []:
        for files in config["data_files"]:
            if not any(folder.glob(files["path"])):
                yield f"configs names {files['path']}, and there is no such file"


def _check_space_metadata(folder: Path, metadata: dict[str, Any]) -> Iterator[str]:
    if metadata.get("sdk") not in SPACE_SDKS:
        yield f"sdk is {metadata.get('sdk')!r}; it can be {', '.join(SPACE_SDKS)}"
    if metadata.get("sdk") == "gradio" and not metadata.get("sdk_version"):
        yield "sdk_version is missing"
    if not (folder / metadata.get("app_file", "app.py")).is_file():
        yield f"app_file is {metadata.get('app_file', 'app.py')!r}, and there is no such file"
    for name in ("colorFrom", "colorTo"):
        if metadata.get(name, "red") not in SPACE_COLORS:
            yield f"{name} is {metadata[name]!r}; it can be {', '.join(SPACE_COLORS)}"
    if len(metadata.get("short_description") or "") > 60:
        yield "short_description has more than 60 characters"


def _find_language_problems(metadata: dict[str, Any]) -> Iterator[str]:
    languages = metadata.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not _LANGUAGE.fullmatch(str(language)):
            yield f"language is {language!r}, which is no code such as 'en'"


def _check_model_files(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    needed = [*shards, "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"]
    yield from _find_missing(folder, needed)


def _check_adapter_files(folder: Path) -> Iterator[str]:
    yield from _find_missing(folder, ["adapter_config.json", "adapter_model.safetensors", "processor_config.json"])


def _find_missing(folder: Path, names: list[str]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in names if not (folder / name).is_file())


def _check_nothing(folder: Path) -> Iterator[str]:
    return iter(())


_CONTENT_CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "model": _check_model_files,
    "adapter": _check_adapter_files,
    "dataset": _check_nothing,
    "space": _check_nothing,
}
_METADATA_CHECKS: dict[str, Callable[[Path, dict[str, Any]], Iterator[str]]] = {
    "model": _check_model_metadata,
    "adapter": _check_adapter_metadata,
    "dataset": _check_dataset_metadata,
    "space": _check_space_metadata,
}
