"""What repositories of every kind may not hold: code that runs, tokens, paths of this machine, wrong licences.

All of it is found on this machine, since `llava export` and `--dry-run` ask nobody; the Hub itself looks at the
metadata of a card when it goes up (huggingface_hub 2.4, hf_api.py). Whether the licence of a model fits those of its
parts is reported for a person to look at; it is no legal advice.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_llava.records.training_record import LICENSES
from modeling_llava.records.yaml_fields import ACCESS_TOKEN
from processing_llava.data.clean_images import clean_image
from processing_llava.data.data_sources import PICTURE_LIMITS

MAX_FILE_BYTES = 500_000_000_000
"""Size of the largest file that the Hub takes: https://huggingface.co/docs/hub/storage-limits."""
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
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
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,4})?|multilingual|code")
_ID_FIELDS = ("base_model", "datasets", "models")

# fmt: off
NON_COMMERCIAL = frozenset({
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "deepfloyd-if-license", "fair-noncommercial-research-license",
    "h-research", "intel-research",
})
NO_DERIVATIVES = frozenset({"cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"})
SHARE_ALIKE = frozenset({
    "agpl-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cdla-sharing-1.0", "gpl", "gpl-2.0", "gpl-3.0", "odbl",
})
PASSED_ON = frozenset({
    "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "openrail", "creativeml-openrail-m",
})
"""Licences of models whose terms every derivative carries on."""
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Card:
    """README.md of a repository."""

    metadata: dict[str, Any] | None
    """None where there are none that can be read."""
    text: str = ""
    problem: str | None = None
    """Why there are no metadata."""


def read_card(folder: Path) -> Card:
    """The README.md of a folder, whatever is wrong with it."""
    path = folder / "README.md"
    if not path.is_file():
        return Card(metadata=None, problem="README.md is missing")
    text = path.read_text(encoding="utf-8")
    block = REGEX_YAML_BLOCK.search(text)
    try:
        metadata = yaml.safe_load(block.group(2)) if block else None
    except yaml.YAMLError as error:
        return Card(metadata=None, problem=f"the metadata of README.md is not YAML ({error})")
    if not isinstance(metadata, dict):
        return Card(metadata=None, problem="README.md does not begin with metadata between two lines of ---")
    return Card(metadata=metadata, text=text[block.end() :])


def find_file_problems(folder: Path) -> Iterator[str]:
    """Files that are too large, run code when they are loaded, or hold secrets or paths of this machine."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            size, limit = f"{path.stat().st_size:,}", f"{MAX_FILE_BYTES:,}"
            yield f"{name} has {size} bytes, and the Hub takes at most {limit} in one file: split it"
        if path.suffix.lower() in IMAGE_FILES and clean_image(path, limits=PICTURE_LIMITS) != path.read_bytes():
            yield f"{name} holds more than pixels, such as text; export it again"
        if path.suffix in _PICKLES:
            yield f"{name} can hold code that runs when it is loaded; save it as safetensors"
        if path.name == ".env":
            yield f"{name} usually holds secrets"
        if path.suffix in _TEXT_FILES and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            if ACCESS_TOKEN.search(text):
                yield f"{name} holds an access token"
            if path.suffix == ".json":
                for value in _list_texts(json.loads(text)):
                    yield from (f"{name} holds the path {found} of this machine" for found in find_paths(value))


def clean_images_in_files(folder: Path) -> None:
    """Take everything but pixels out of the image files of a folder: their text may hold paths and tokens.

    Raises:
        ValueError: a file is no image.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix.lower() in IMAGE_FILES:
            cleaned = clean_image(path, limits=PICTURE_LIMITS)
            if cleaned != path.read_bytes():
                path.write_bytes(cleaned)


def find_card_problems(folder: Path, card: Card) -> Iterator[str]:
    """What is wrong with a card, whatever kind of repository it describes."""
    if card.problem is not None:
        yield card.problem
        return
    for mark in dict.fromkeys(_TEMPLATE_MARK.findall(card.text)):
        yield f"README.md holds {mark!r}, which a template left behind"
    for path in find_paths(card.text):
        yield f"README.md holds the path {path} of this machine"
    for link in _RELATIVE_LINK.findall(card.text):
        if not (folder / link).exists():
            yield f"README.md links {link}, and there is no such file"
    license_id = card.metadata.get("license")
    if license_id not in LICENSES:
        yield f"license is {license_id!r}, which the Hub does not know"
    has_terms = "license_link" in card.metadata or any(folder.glob("LICENSE*"))
    if license_id == "other" and not ("license_name" in card.metadata and has_terms):
        yield "license is 'other' without license_name, and license_link or a file LICENSE"
    for name in _ID_FIELDS:
        for repo_id in list_values(card.metadata, name):
            try:
                validate_repo_id(repo_id)
            except HFValidationError:
                yield f"{name} is {repo_id!r}, which is no id of the Hub"


def find_missing(folder: Path, names: list[str]) -> Iterator[str]:
    """Files that a kind of repository needs and a folder lacks."""
    yield from (f"{name} is missing" for name in names if not (folder / name).is_file())


def find_language_problems(metadata: dict[str, Any]) -> Iterator[str]:
    """Languages of a model or dataset that are no codes."""
    for language in list_values(metadata, "language"):
        if not _LANGUAGE.fullmatch(str(language)):
            yield f"language is {language!r}, which is no code such as 'en'"


def list_values(metadata: dict[str, Any], name: str) -> list[Any]:
    """The values of a field that may hold one text or several."""
    values = metadata.get(name) or []
    return [values] if isinstance(values, str) else values


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that a model or dataset was made of."""

    name: str
    kind: str
    """"base model" or "data"."""
    license: str | None
    """Identifier of the Hub; None where nobody said."""


def find_conflicts(license_id: str, parts: list[Part]) -> list[str]:
    """What does not fit between a licence and those of the parts, one sentence each.

    Args:
        license_id: Licence of the whole, as the Hub calls it.
    """
    conflicts = []
    for part in parts:
        named = f"{part.kind} {part.name} is under {part.license}"
        if part.license is None or part.license == "unknown":
            conflicts.append(f"the licence of {part.kind} {part.name} is not stated")
        elif part.license == "other":
            conflicts.append(f"{part.kind} {part.name} has terms of its own, which have to be read")
        if part.license in NO_DERIVATIVES:
            conflicts.append(f"{named}, which allows no derivatives")
        if part.license in NON_COMMERCIAL and license_id not in NON_COMMERCIAL:
            own = "the terms of the model have to be read" if license_id == "other" else f"{license_id} does not"
            conflicts.append(f"{named}, which forbids commercial use; {own}")
        if part.license in SHARE_ALIKE and part.license != license_id:
            conflicts.append(f"{named}, which asks derivatives to be shared alike; the model is under {license_id}")
        if part.kind == "base model" and part.license in PASSED_ON and part.license != license_id:
            conflicts.append(f"{named}, whose terms derivatives carry on; the model is under {license_id}")
    return conflicts


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


def cut_paths_in_files(folder: Path) -> None:
    """Cut the paths in every JSON file of a folder; a tokenizer's stays, whose pieces can look like paths."""
    for path in folder.rglob("*.json"):
        if path.name == "tokenizer.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        cut = _cut_json(content)
        if cut != content:
            path.write_text(json.dumps(cut, indent=2) + "\n", encoding="utf-8")


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _cut_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut_json(item) for item in value]
    return cut_paths(value) if isinstance(value, str) else value


def _list_texts(value: Any) -> Iterator[str]:
    """Every text among the values of a JSON file."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _list_texts(item)
    elif isinstance(value, str):
        yield value
