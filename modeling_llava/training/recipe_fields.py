"""The fields of a recipe: read from YAML, set beside the file, and checked by the dataclass that takes them.

What is surprising: YAML 1.1, which PyYAML reads, takes 1e-4 for text because it has no point, and no for false. Here
the one is a number, and the other a word, as `save_strategy: no` means it.
"""

import dataclasses
import difflib
import re
from typing import Any, TypeVar, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

_BOOLEAN = "tag:yaml.org,2002:bool"


class RecipeLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number and "no" as a word, as everybody else, and refuses a key that stands there twice."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
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


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
RecipeLoader.add_implicit_resolver(_BOOLEAN, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def apply_setting(fields: dict[str, Any], setting: str) -> None:
    """Set, or take out, one key of a recipe that was read.

    Args:
        setting: `KEY=VALUE`; see `read_recipe`.

    Raises:
        ValueError: naming the setting, if it has no place.
    """
    key, equals, text = setting.partition("=")
    if not key or not equals:
        raise ValueError(f"got {setting!r}; expected KEY=VALUE, such as trainer.learning_rate=1e-4")
    *parents, last = key.split(".")
    place: Any = fields
    try:
        value = yaml.load(text, RecipeLoader)
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        name = int(last) if isinstance(place, list) else last
        if text:
            place[name] = value
        else:
            del place[name]
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"got {setting!r}; expected a key of the recipe and a value in YAML, such as trainer.learning_rate=1e-4 "
            "or data.0.path=rows.json; or nothing after = for a key that is there, to take it out"
        ) from error


T = TypeVar("T")


def build(kind: type[T], fields: dict[str, Any], *, where: str) -> T:
    """An object of a dataclass from what stands in `where`, checked as in `check_fields`."""
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
        raise ValueError(f"got {fields!r} as {where}; expected a mapping")
    known = {item.name: item for item in dataclasses.fields(kind)}
    unknown = [str(name) for name in fields if name not in known]
    if unknown:
        # SFTConfig has more fields than a line can hold.
        similar = known if len(known) < 30 else difflib.get_close_matches(unknown[0], known, n=5)
        listed = f", such as {', '.join(similar)}" if similar else ""
        raise ValueError(f"got {', '.join(unknown)} in {where}; expected fields of {kind.__name__}{listed}")
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
            raise ValueError(f"got {name}={value!r} in {where}; expected one of {', '.join(choices)}")


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
    raise ValueError(f"got {name}={value!r} in {where}; expected {listed}")
