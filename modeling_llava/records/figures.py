"""Numbers that know the file they come from, and templates that print no other.

What is surprising: an expression of a template that gives a bare number is an error. Arithmetic loses the source on
purpose: what a card says can be found in a file, digit by digit.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import hub_cards

from .yaml_fields import read_yaml

RESULTS_FOLDER = "results"
"""Where a model folder keeps the results of its evaluations, one JSON file each."""
_RESULT_FIELDS = {"benchmark", "dataset", "split", "metric", "value", "n"}
_OPTIONAL_FIELDS = {"task_id"}
_RUN_FIELDS = {"seed", "commit", "command", "results"}
_LOOSE_FIGURE = re.compile(
    r"""\d[\d.,]*\s?(?:%|per\ ?cent\b)
    | (?<![\w.])0?\.\d+
    | (?<![\w.])\d{2,}\.\d{1,3}(?![\w.]*\w)(?!\ (?:thousand|million|billion)\b)
    | \b\d[\d,]*\ (?:out\ )?of\ (?:the\ )?\d[\d,]*""",
    flags=re.VERBOSE,
)
"""A share, or a decimal that is neither a version (v1.5, CC BY 4.0) nor a size (10.5 million)."""


class SourcedInt(int):
    """An integer that was read from a file."""

    source: str


class SourcedFloat(float):
    """A float that was read from a file."""

    source: str


def add_source(value: Any, source: str) -> Any:
    """The same value, every number in it knowing `source`."""
    if isinstance(value, dict):
        return {name: add_source(item, source) for name, item in value.items()}
    if isinstance(value, list):
        return [add_source(item, source) for item in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    number = SourcedInt(value) if isinstance(value, int) else SourcedFloat(value)
    number.source = source
    return number


def read_sourced_json(path: Path, *, root: Path) -> Any:
    """The content of a JSON file, whose numbers know their path from `root`.

    Raises:
        ValueError: naming the file, if it is no JSON.
    """
    try:
        return add_source(json.loads(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {path} ({error}); expected JSON; write it again, or take it out") from error


def read_sourced_yaml(path: Path) -> Any:
    """The content of a YAML file, whose numbers know its name.

    Raises:
        ValueError: as `read_yaml`.
    """
    return add_source(read_yaml(path), path.name)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure of an evaluation, with everything that repeating it takes."""

    benchmark: str
    dataset: str
    split: str
    metric: str
    value: SourcedFloat | SourcedInt
    n: SourcedInt
    seed: SourcedInt
    commit: str
    command: str
    task_id: str | None = None
    """Name of the benchmark in eval.yaml of its dataset on the Hub. With it the figure goes into the results file that
    the Hub reads."""


def read_results(folder: Path) -> list[Result]:
    """The results of a model folder.

    A file holds `seed`, `commit`, `command` and `results`, a list of `{"benchmark", "dataset", "split", "metric",
    "value", "n"}`, and "task_id" where the dataset is registered on the Hub as a benchmark.

    Raises:
        ValueError: naming the file and what it lacks: a figure that cannot be repeated is not printed.
    """
    found = []
    for path in sorted((folder / RESULTS_FOLDER).glob("*.json")):
        content = read_sourced_json(path, root=folder)
        if not isinstance(content, dict) or set(content) != _RUN_FIELDS:
            raise ValueError(f"got {path}; expected one object with {', '.join(sorted(_RUN_FIELDS))}")
        run = {name: content[name] for name in _RUN_FIELDS - {"results"}}
        for item in content["results"]:
            if set(item) - _OPTIONAL_FIELDS != _RESULT_FIELDS:
                raise ValueError(f"got a result in {path}; expected {', '.join(sorted(_RESULT_FIELDS))} in each")
            found.append(Result(**item, **run))
    return found


def refuse_loose_figures(text: str, where: str) -> None:
    """Refuse the figure of a measurement in a text that somebody wrote.

    Raises:
        ValueError: quoting it.
    """
    figure = _LOOSE_FIGURE.search(text)
    if figure is not None:
        raise ValueError(
            f"got the figure {figure.group()!r} in {where}; expected figures in files of {RESULTS_FOLDER}/, which the "
            "card quotes: move it there"
        )


def build_environment() -> jinja2.Environment:
    """Templates of `hub_cards` that refuse numbers without a source, and names that are not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(hub_cards.__file__).parent),
        undefined=jinja2.StrictUndefined,
        finalize=_refuse_bare_numbers,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _format_figure
    return environment


def _refuse_bare_numbers(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not isinstance(value, (SourcedInt, SourcedFloat)):
        raise ValueError(f"got the number {value} without its source; expected one that was read from a file")
    return value


def _format_figure(value: SourcedInt | SourcedFloat, form: str = "") -> str:
    return format(_refuse_bare_numbers(value), form)
