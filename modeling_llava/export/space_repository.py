"""A Space: its own files, a card, and this package where its requirements.txt names it.

What is surprising: the package lies there as folders, not as a wheel. A Space installs its requirements before its own
files are there, so that none of them can be named, and an address of the Hub would need a public Space.
"""

import re
import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from modeling_llava.records.figures import build_environment

from .export_settings import CardFacts, Exported, ExportSettings
from .model_card import assemble_card

NAME = "anyllava"
PACKAGES = ("hub_cards", "modeling_llava", "processing_llava", "spaces_demo")
SPACE_SDKS = ("gradio", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".gradio", ".cache", ".env")
_GRADIO_PIN = re.compile(r"^gradio(?:\[[\w,]+\])?\s*==\s*([\w.]+)", flags=re.MULTILINE)
_OURS = re.compile(rf"{NAME}\s*(?:\[([\w\s,-]*)\])?\s*(?:==\s*([\w.]+))?", flags=re.IGNORECASE)
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")


def write_space_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Copy a Space, with a card if it has none, and with this package if it needs it.

    Raises:
        ValueError: if its card cannot be written, or this package cannot be put into it.
    """
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=_NOT_COPIED)
    if not (out / "README.md").is_file():
        card = _write_card(out, facts=settings.facts, repo_id=settings.repo_id)
        (out / "README.md").write_text(card, encoding="utf-8")
    return Exported(folder=out, kind="space", notices=_carry_package(out))


def find_space_problems(folder: Path, metadata: dict[str, Any] | None) -> Iterator[str]:
    """What the Hub would not start, or not show as the card says."""
    if metadata is None:
        return
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


def _write_card(folder: Path, *, facts: CardFacts, repo_id: str) -> str:
    """The card of a Gradio Space, with the version of Gradio that its requirements.txt pins.

    Raises:
        ValueError: if the version or the licence is missing.
    """
    requirements = folder / "requirements.txt"
    pin = _GRADIO_PIN.search(requirements.read_text(encoding="utf-8")) if requirements.is_file() else None
    if pin is None:
        raise ValueError(f"got {folder} without gradio==VERSION in requirements.txt; expected the version to run on")
    title = facts.choose_title(repo_id)
    metadata = SpaceCardData(
        title=title,
        emoji="\N{VOLCANO}",
        colorFrom="red",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=pin.group(1),
        app_file="app.py",
        license=facts.require_license(),
        models=facts.base_model or None,
        tags=["llava", *facts.tags],
    )
    body = build_environment().get_template("space.md.jinja").render(title=title, facts=facts)
    return assemble_card(metadata, body, layout="space", repo_id=repo_id)


def _carry_package(folder: Path) -> list[str]:
    """Put this package into a Space whose requirements.txt names it, and its requirements in place of the name.

    Returns:
        What a person should know.

    Raises:
        ValueError: if another version of it is named, or one of its folders is there already.
    """
    requirements = folder / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    named = [_OURS.fullmatch(line.partition("#")[0].strip()) for line in lines]
    match = next(filter(None, named), None)
    if match is None:
        return []
    installed = distribution(NAME)
    if match[2] not in (None, installed.version):
        raise ValueError(
            f"got {NAME}=={match[2]} in requirements.txt; expected {installed.version}, which runs here and goes into "
            "the Space"
        )
    for package in PACKAGES:
        if (folder / package).exists():
            raise ValueError(f"got a Space with {package} and {NAME} in requirements.txt; expected one of them")
        source = Path(find_spec(package).origin).parent
        shutil.copytree(source, folder / package, ignore=_NOT_COPIED)
    # Modules beside the checkpoint build it; no installation has them.
    for builder in (folder / "modeling_llava" / "tiny_llava").glob("*.py"):
        builder.unlink()
    extras = {extra.strip() for extra in (match[1] or "").split(",")}
    kept = [line for line, ours in zip(lines, named) if ours is None]
    pinned = {_read_name(line) for line in kept}
    needed = [line for line in _list_requirements(installed.requires or [], extras) if _read_name(line) not in pinned]
    requirements.write_text("\n".join([*kept, *needed]) + "\n", encoding="utf-8")
    return [f"the Space carries {NAME} {installed.version}, which is on no package index: {', '.join(PACKAGES)}"]


def _list_requirements(lines: list[str], extras: set[str]) -> list[str]:
    """Requirements of an installed package, with those of its extras."""
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        if extra is None or extra[1] in extras:
            found.append(requirement.strip())
    return found


def _read_name(line: str) -> str:
    """The name of a requirement, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", line.strip())[0]).lower()
