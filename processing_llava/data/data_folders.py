"""What a folder or a Hub dataset may name as its data: files of its own, and nothing else.

README.md and .huggingface.yaml of a folder name patterns that `datasets` looks up: absolute ones, those with `..`, and
addresses on the network too (datasets 5.2, data_files.py). `state.json` of a saved dataset names files as freely. A
model that was trained on such a file can tell what was in it.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

_CARDS = ("README.md", ".huggingface.yaml")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", flags=re.DOTALL)
_MOST_CHARACTERS, _MOST_ITEMS = 100_000, 20_000


def check_card(path: str | Path) -> None:
    """Refuse a folder whose cards name data elsewhere, before `datasets` looks for it.

    Raises:
        ValueError: naming the card and what it names.
    """
    for card in (Path(path) / name for name in _CARDS):
        if not card.is_file():
            continue
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_CHARACTERS)
        if card.suffix == ".md":
            matter = _FRONT_MATTER.match(text)
            text = matter[1] if matter else ("" if len(text) < _MOST_CHARACTERS else text)
        for pattern in _find_patterns(_read_fields(text, card)):
            if "::" in pattern or "://" in pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
                raise _outside(card, pattern, "another place")


def check_saved(path: str | Path, *, follow_links: bool) -> None:
    """Refuse a folder of `save_to_disk` whose splits or tables lie elsewhere.

    Raises:
        ValueError: naming the file and what it names, or if it cannot be read.
    """
    path = Path(path)
    folders = [path]
    if (path / "dataset_dict.json").is_file():
        splits = [str(split) for split in _read_json(path / "dataset_dict.json").get("splits") or ()]
        check_inside(path, splits, by="dataset_dict.json", follow_links=follow_links)
        folders = [path / split for split in splits]
    for folder in filter(lambda folder: (folder / "state.json").is_file(), folders):
        tables = [str(item.get("filename")) for item in _read_json(folder / "state.json").get("_data_files") or ()]
        check_inside(folder, tables, by="state.json", follow_links=follow_links)


def check_inside(path: str | Path, names: Iterable[str], *, by: str, follow_links: bool) -> None:
    """Refuse names that lead out of a folder.

    Args:
        by: What names them.
        follow_links: Symbolic links in the folder may.

    Raises:
        ValueError: naming the first one.
    """
    resolve = os.path.abspath if follow_links else os.path.realpath
    root = resolve(path)
    for name in names:
        found = resolve(os.path.join(root, name))
        if "::" in name or "://" in name or os.path.commonpath([root, found]) != root:
            raise _outside(Path(path) / by, name, found)


def _outside(card: Path, name: str, found: str) -> ValueError:
    return ValueError(
        f"got {card}, which names the data {name[:80]!r} in {found[:200]}; expected files inside of its folder: "
        "correct it, or allow links that you made yourself (follow_links, --follow-links)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")[:_MOST_CHARACTERS])
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"got {path} ({type(error).__name__}); expected what save_to_disk wrote: copy it again"
        ) from error


def _read_fields(text: str, card: Path) -> Any:
    """The fields of a card, if aliases do not make them more than a card can hold."""
    if len(text) >= _MOST_CHARACTERS:
        raise ValueError(f"got {card} with more than {_MOST_CHARACTERS:,} characters; expected fewer: shorten it")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        nodes, num_nodes = [node], 0
        while nodes:
            node = nodes.pop()
            num_nodes += 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
            if num_nodes > _MOST_ITEMS:
                raise ValueError(f"got {card} with more than {_MOST_ITEMS:,} items; expected fewer: shorten it")
            if isinstance(node, yaml.MappingNode):
                nodes.extend(part for pair in node.value for part in pair)
            elif isinstance(node, yaml.SequenceNode):
                nodes.extend(node.value)
        return yaml.load(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"got {card}, whose fields are no YAML ({reason}); expected some, or none: correct it"
        ) from error


def _find_patterns(fields: Any) -> Iterator[str]:
    """All texts under `data_files` and `data_dir` of the configurations, whatever their form."""
    configs = fields.get("configs") if isinstance(fields, dict) else None
    for config in configs if isinstance(configs, list) else ():
        places = [config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else []
        while places:
            place = places.pop()
            if isinstance(place, str):
                yield place
            elif isinstance(place, (dict, list)):
                places.extend(place.values() if isinstance(place, dict) else place)
