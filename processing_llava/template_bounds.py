"""Chat templates are programs of strangers: what they may use, and how much, is bounded here.

A rendering has a number of steps, which grows with what it is given. Every node of the template that runs in a loop or
a macro is a step, and so is every `_CHARS` of the texts and lists that operators, filters and methods take and make:
these are an explicit list, and what some of them would make out of little is reckoned before it is made. Nothing else
in Jinja costs more than the nodes of the template, whose number and depth have bounds.

What is surprising: the template is rewritten after it was parsed. Jinja lets a sandbox see arithmetic, calls and
filters, and neither loops nor "~", slices or comparisons, so these become filters with names that no template can
write. What it prints is byte for byte what transformers' own environment prints (utils/chat_template_utils.py, 5.24).
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, partial, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_LENGTH, MAX_NODES, MAX_DEPTH = 100_000, 10_000, 100
"""Bounds of a template. The largest of 148 published ones has 19,572 characters and 1,404 nodes, 22 deep."""
BASE_STEPS, STEPS_PER_CHARACTER, STEPS_PER_VALUE = 50_000, 32, 4_096
"""Steps of a rendering, and more for what it is given: Gemma 4's template reads all messages
anew for each of them, and SmolVLM's each character of a text."""
_VALUE, _CHARS = 16, 16
_MAX_BITS = 10_000
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_FILTERS, _METHODS, _KINDS, _COMPARISONS = map(
    str.split,
    (
        "abs capitalize count d default dictsort e escape first float indent int items join last length list lower "
        "map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper",
        "capitalize casefold count endswith find get index isalnum isalpha isascii isdecimal isdigit islower "
        "isnumeric isprintable isspace istitle isupper items join keys lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title "
        "upper values",
        "boolean defined false float integer iterable mapping none number sequence string true undefined",
        "!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt ne sameas",
    ),
)
"""Filters, methods and tests that templates may use; the last are tests that compare."""
_AMPLIFIERS = {"indent", "join", "lstrip", "replace", "rstrip", "strip", "tojson", "trim"}
"""What these make, or their time, can be a product of what they are given."""
_TICK, _CHARGE, _CONCAT = "a step", "a charge", "~"
_UNUSED = (nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier)


class CostlyTemplateError(ValueError):
    """A template that costs more than any that writes messages."""

    def __init__(self, what: str) -> None:
        super().__init__(f"got the chat template, which {what}; expected one that writes messages: choose another one")


class _Run:
    """What is left to a rendering, and the spans of `{% generation %}` in what it wrote so far."""

    def __init__(self, given: Any) -> None:
        self.limit = self.steps = BASE_STEPS + STEPS_PER_CHARACTER * _measure(
            given, 10**9, STEPS_PER_VALUE // STEPS_PER_CHARACTER
        )
        self.length, self.spans = 0, []

    def take(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CostlyTemplateError(f"takes more than {self.limit:,} steps")

    def charge(self, value: Any) -> Any:
        size = len(value) if isinstance(value, str) else _measure(value, self.steps * _CHARS)
        self.take(1 + size // _CHARS)
        return value


_run: ContextVar[_Run] = ContextVar("run")


@contextmanager
def _running(given: Any) -> Iterator[_Run]:
    """Bounds what is done inside, and tells every error as one of templates."""
    token = _run.set(_Run(given))
    try:
        yield _run.get()
    except (TemplateError, TypeError, ValueError):
        raise
    except RecursionError as error:
        raise CostlyTemplateError("calls itself, or is nested, too deep") from error
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    finally:
        _run.reset(token)


def _measure(value: Any, most: int, each: int = _VALUE) -> int:
    """The characters of a value and of all in it, and `each` for itself and those; counting ends beyond `most`."""
    size, waiting = each, [value]
    while waiting and size <= most:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, range):
            size += each * len(value)
        elif isinstance(value, (dict, list, tuple, *_VIEWS)):
            size += each * len(value)
            waiting += value
            waiting += value.values() if isinstance(value, dict) else ()
    return size


def _invoke(name: str, function: Callable, owner: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls what is charged for what it takes, for what it could make, and for what it made."""
    run = _run.get()
    if name in _AMPLIFIERS:
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        *others, longest = sorted(map(_weigh, (owner, *args, *kwargs.values())))
        run.take((1 + longest) * (1 + sum(others)) // _CHARS)
    for value in (owner, *args, *kwargs.values()):
        run.charge(value)
    made = function(*args, **kwargs)
    return map(run.charge, made) if isinstance(made, Iterator) else run.charge(made)


def _weigh(value: Any) -> int:
    return abs(value) if isinstance(value, int) else _measure(value, _run.get().steps * _CHARS) - _VALUE


def _bound(name: str, function: Callable) -> Callable:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return _invoke(name, function, None, args, kwargs)

    return bounded


# What templates may use beside what Jinja brings, as in transformers.


@pass_context
def _tick(context: Any, value: Any, steps: int) -> Any:
    _run.get().take(steps)
    return value


def _charge(value: Any) -> Any:
    return _run.get().charge(value)


def _concat(values: tuple[Any, ...]) -> str:
    run = _run.get()
    return run.charge("".join([str(run.charge(value)) for value in values]))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise TemplateError(message)


def _tell_time(form: str) -> str:
    if len(form) > 100 or re.search(r"\d\d", form):
        raise CostlyTemplateError("asks for the time in a form of more than 100 characters, or with widths")
    return datetime.now().strftime(form)


class _Names(Namespace):
    """A namespace; its text is not that of what it holds, which has not been charged."""

    __repr__ = object.__repr__


def _make_names(*args: Any, **kwargs: Any) -> _Names:
    names = dict(*args, **kwargs)
    if any(str(name).startswith("_") for name in names):
        raise SecurityError("names in a namespace do not begin with an underscore")
    return _Names(names)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Generation(Extension):
    """`{% generation %}`, around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(lineno)

    def _mark(self, caller: Macro) -> str:
        written, run = caller(), _run.get()
        run.spans.append((run.length, run.length + len(written)))
        return written


class _Rewriter(NodeTransformer):
    """Puts steps into what is done again and again, and charges into what a sandbox does not see."""

    def _charge(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else _filter(node, _CHARGE)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filter(nodes.Tuple(self.generic_visit(node).nodes, "load"), _CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self.generic_visit(node)
        node.expr = self._charge(node.expr)
        return node

    visit_Operand = visit_Compare

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, _CHARGE)
        node.arg = self._charge(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node = self.generic_visit(node)
        node.key = self._charge(node.key)
        return node

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        _make_names({node.attr: None})
        return node

    def visit_For(self, node: Any) -> nodes.Node:
        steps, test = _count_steps(node.body), getattr(node, "test", None)
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), _TICK, steps), lineno=node.lineno))
        if test is not None:
            node.test = _filter(node.test, _TICK, _count_steps([test]))
        return node

    visit_Macro = visit_CallBlock = visit_Template = visit_For


def _filter(node: nodes.Expr, name: str, *args: int) -> nodes.Filter:
    return nodes.Filter(node, name, list(map(nodes.Const, args)), [], None, None)


def _count_steps(body: list[nodes.Node]) -> int:
    """Nodes that run each time; loops and macros in them count themselves."""
    steps, waiting = 1, list(body)
    while waiting:
        node = waiting.pop()
        steps += 1 + (len(node.data) // _CHARS if isinstance(node, nodes.TemplateData) else 0)
        is_counted = isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
        waiting += node.iter_child_nodes(exclude=("body",) if is_counted else None)
    return steps


def _check_tree(tree: nodes.Template) -> None:
    level, num_nodes = [tree], 0
    for _ in range(MAX_DEPTH):
        num_nodes += len(level)
        level = [child for node in level for child in node.iter_child_nodes()]
    if level or num_nodes > MAX_NODES:
        raise CostlyTemplateError(f"has more than {MAX_NODES:,} parts, or parts nested deeper than {MAX_DEPTH}")
    if (unused := next(tree.find_all(_UNUSED), None)) is not None:
        raise CostlyTemplateError(f"holds a tag of pages ({type(unused).__name__.lower()})")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_charge
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bound(name, self.filters[name]) for name in (*_FILTERS, "tojson")}
        self.filters |= {_TICK: _tick, _CHARGE: _charge, _CONCAT: _concat}
        compared = {name: _bound(name, self.tests[name]) for name in _COMPARISONS}
        self.tests = {name: self.tests[name] for name in _KINDS} | compared
        self.globals = {
            "dict": _make_dict,
            "namespace": _make_names,
            "raise_exception": _raise,
            "range": safe_range,
            "strftime_now": _tell_time,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_known = isinstance(obj, (Namespace, LoopContext)) or attr in _METHODS
        return is_known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is a method like any other, and none that templates need."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        run = _run.get()
        if isinstance(left, str) and operator == "%":
            raise CostlyTemplateError("formats a text with %")
        whole = [value for value in (left, right) if isinstance(value, int)]
        bits = max((value.bit_length() for value in whole), default=0)
        if bits > _MAX_BITS or (operator == "**" and bits * abs(whole[-1]) > _MAX_BITS):
            raise CostlyTemplateError("computes with numbers of thousands of digits")
        if operator == "*" and len(whole) == 1:
            run.take(_weigh(left) * _weigh(right) // _CHARS)
        return run.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja's own, which do not reach what is called.
        hidden = {name: kwargs.pop(name) for name in ("_loop_vars", "_block_vars") if name in kwargs}
        function = partial(super().call, __context, __obj, **hidden)
        if isinstance(__obj, (Macro, LoopContext)):
            _run.get().take(1 + len(args) + len(kwargs))
            return function(*args, **kwargs)
        return _invoke(getattr(__obj, "__name__", ""), function, getattr(__obj, "__self__", None), args, kwargs)


_ENVIRONMENT = _Environment()


@lru_cache(maxsize=64)
def compile_template(text: str) -> Template:
    """A template that cannot cost much.

    Raises:
        CostlyTemplateError: it is longer, deeper or of more parts than any that writes messages.
        jinja2.TemplateError: it is no Jinja text.
    """
    if len(text) > MAX_LENGTH:
        raise CostlyTemplateError(f"has {len(text):,} characters, more than {MAX_LENGTH:,}")
    with _running(None):
        tree = _ENVIRONMENT.parse(text)
        _check_tree(tree)
        return _ENVIRONMENT.from_string(_Rewriter().visit(tree))


def write_template(text: str, given: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """What a template writes, and the ranges in it that stand in `{% generation %}`.

    Args:
        text: Jinja text.
        given: Its variables, of types that JSON knows.

    Raises:
        CostlyTemplateError: it takes more steps than its variables are worth.
        jinja2.TemplateError, TypeError, ValueError: it cannot write them.
    """
    template, blocks = compile_template(text), []
    with _running(given) as run:
        for block in template.generate(given):
            blocks.append(block)
            run.length += len(block)
    return "".join(blocks), run.spans
