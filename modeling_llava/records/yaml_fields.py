"""The fields of a recipe, card or manifest: read from YAML, and checked by the dataclass that takes them.

What is surprising: YAML 1.1 takes 1e-4 for text because it has no point, "no" for false, and 2024-01-01 for a date
(PyYAML 6.0, resolver.py). Here the first is a number, and the others are text, as `save_strategy: no` means it.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from processing_llava.data.data_bounds import MOST_YAML_CHARACTERS, MOST_YAML_ITEMS, exceeds_items
from processing_llava.messages import shorten

ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
"""A token of the Hub. No recipe, message or repository may hold one."""
MOST_QUOTED = 1000
"""Characters of a text of several parts, such as unknown names, in a message."""
_BOOLEAN, _DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"


class FieldsLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number, "no" and dates as text, and refuses a key that stands there twice."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _DATE)]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"got {key.value!r} twice; expected it once: take one of them out",
                    problem_mark=key.start_mark,
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


FieldsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
FieldsLoader.add_implicit_resolver(_BOOLEAN, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: naming it, if there is none, or it is not YAML.
    """
    if not path.is_file():
        raise ValueError(f"got {str(path)!r}; expected a YAML file: there is none at this path")
    try:
        with path.open(encoding="utf-8") as file:
            return load_yaml(file.read(MOST_YAML_CHARACTERS + 1))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = f"lists in each other without end ({error})" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"got {path}, which is not YAML; expected fields in YAML: {str(reason)[:MOST_QUOTED]}"
        ) from error


def load_yaml(text: str) -> Any:
    """What a text in YAML stands for, if it is a recipe's or a card's size.

    Raises:
        ValueError: it is longer, or stands for more items, as aliases of aliases do.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MOST_YAML_CHARACTERS:
        raise ValueError(f"got more than {MOST_YAML_CHARACTERS:,} characters; expected fewer: shorten it")
    loader = FieldsLoader(text)
    root = loader.get_single_node()
    if exceeds_items(root):
        raise ValueError(f"got more than {MOST_YAML_ITEMS:,} items, aliases counted; expected fewer: shorten it")
    return None if root is None else loader.construct_document(root)


T = TypeVar("T")


def build(kind: type[T], fields: dict[str, Any], *, where: str) -> T:
    """An object of a dataclass from its fields, checked as in `check_fields`."""
    check_fields(fields, kind, where=where)
    return kind(**fields)


def check_fields(fields: dict[str, Any], kind: type, *, where: str, untyped: tuple[str, ...] = ()) -> None:
    """Refuse unknown and missing fields of a dataclass, and values of another type or beside the choices of a field.

    Args:
        untyped: Fields whose type says less than what they take.

    Raises:
        ValueError: naming `where`, the field, and what was expected.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"got {shorten(fields)} as {where}; expected a mapping")
    known = {item.name: item for item in dataclasses.fields(kind)}
    unknown = [str(name) for name in fields if name not in known]
    if unknown:
        # SFTConfig has more fields than a line can hold.
        similar = known if len(known) < 30 else difflib.get_close_matches(unknown[0], known, n=5)
        listed = f", such as {', '.join(similar)}" if similar else ""
        names = ", ".join(unknown)[:MOST_QUOTED]
        raise ValueError(f"got {names} in {where}; expected fields of {kind.__name__}{listed}")
    required = [
        name
        for name, item in known.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"got {where} without {', '.join(missing)}; expected {', '.join(required)}")
    types = get_type_hints(kind)
    for name, value in fields.items():
        if name not in untyped:
            check_type(name, value, types[name], where=where)
        choices = known[name].metadata.get("choices")
        if choices is not None and value not in (*choices, known[name].default):
            quoted = shorten(value)
            raise ValueError(f"got {name}={quoted} in {where}; expected one of {', '.join(choices)}")


def check_type(name: str, value: Any, expected: Any, *, where: str) -> None:
    """Refuse a value of another type; an integer is a float too.

    Raises:
        ValueError: naming `where`, the field and the type.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    for candidate in (value, float(value)) if is_integer else (value,):
        try:
            type_validator(name, candidate, expected)
        except TypeError:
            continue
        return
    listed = expected.__name__ if isinstance(expected, type) else expected
    raise ValueError(f"got {name}={shorten(value)} in {where}; expected {listed}")
