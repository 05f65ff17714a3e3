"""README.md of a Space that has none."""

import re
from pathlib import Path

from huggingface_hub import SpaceCardData

from modeling_llava.records.figures import build_environment

from .card_facts import CardFacts
from .model_card import assemble_card

_GRADIO_PIN = re.compile(r"^gradio(?:\[[\w,]+\])?\s*==\s*([\w.]+)", flags=re.MULTILINE)


def write_space_card(folder: Path, *, facts: CardFacts, repo_id: str) -> None:
    """Write the card of a Gradio Space, with the version of Gradio that its requirements.txt pins.

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
    (folder / "README.md").write_text(assemble_card(metadata, body, layout="space", repo_id=repo_id), encoding="utf-8")
