"""Chat templates as strangers might publish them: each is refused in one line, soon and in little memory.

`python -m` with names on its standard input is the worker of the tests: one process, which measures each of them.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from processing_llava.processing_llava import AnyLlavaProcessor
from tests.tiny import tiny_processor

WRITE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LOOP = "{% for a in range(99999) %}"
NESTED = LOOP * 3 + "{% endfor %}" * 3


def repeat(step: str, *, times: int = 60, start: str = "'ab'") -> str:
    """A value that grows with each step, in a namespace."""
    return (
        "{% set n = namespace(x="
        + start
        + ") %}{% for a in range("
        + str(times)
        + ") %}{% set n.x = "
        + step
        + (" %}{% endfor %}{{ n.x | string | length }}")
    )


HOSTILE = {
    "nested loops": NESTED,
    "nested loops that filter": LOOP + "{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops in a macro": "{% macro f() %}" + NESTED + "{% endmacro %}{{ f() }}",
    "loops over what a filter makes": LOOP + "{% for b in range(99999) | map('string') %}{% endfor %}{% endfor %}",
    "loops over texts": "{% set t = range(9999) | join %}" + LOOP + "{% for c in t %}{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a loop that calls itself twice": "{% for a in [1] recursive %}{{ loop([1]) if loop.depth < 40 }}"
    "{{ loop([1]) if loop.depth < 40 }}{% endfor %}",
    "much template text in loops": LOOP + "x" * 50_000 + "{% endfor %}",
    "template text in a set block": "{% set t %}" + LOOP + "x" * 5_000 + "{% endfor %}{% endset %}",
    "template text in a filter block": "{% filter upper %}" + LOOP + "x" * 5_000 + "{% endfor %}{% endfilter %}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "cycler": "{% set c = cycler('a') %}{{ c.next() }}",
    "joiner": "{{ joiner() }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center, a filter": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "encode": "{{ 'a'.encode() }}",
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "times": "{{ 'a' * 10**10 }}",
    "times, not printed": "{% set x = 'a' * 10**10 %}",
    "times, in a branch": "{% if false %}{{ 'a' * 10**10 }}{% endif %}{{ ('a' * 500000000) | length }}",
    "times, the other way": "{{ 10**8 * 'a' }}",
    "times, a list": "{{ ([1] * 10**9) | length }}",
    "powers": "{{ 10**(10**9) }}",
    "powers of variables": "{% set x = 9 %}{{ x**(x**x) }}",
    "large products": repeat("n.x * n.x", start="9**99"),
    "large numbers out of texts": "{% set x = ('0x' ~ 'f' * 60000) | int(base=16) %}{{ x // 3 }}",
    "rounds": "{{ 5 | round(-10**9) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format, an operator": "{{ '%1000000000d' % 1 }}",
    "format, of two": "{{ '%*d' % (10**9, 1) }}",
    "format, a method": "{{ '{:>1000000000}'.format(1) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format, a test": "{{ '%1000000000d' is even }}{{ '%1000000000d' is divisibleby 1 }}",
    "doubling by +": repeat("n.x + n.x"),
    "doubling by ~": repeat("n.x ~ n.x"),
    "doubling by join": repeat("[n.x, n.x] | join"),
    "doubling by join, a method": repeat("n.x.join(['', '', ''])"),
    "doubling by replace": repeat("n.x.replace('a', 'aa')"),
    "doubling by replace, a filter": repeat("n.x | replace('a', 'aaaaaaaa')"),
    "replace of nothing": repeat("n.x.replace('', n.x)"),
    "doubling by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + repeat("f(n.x)"),
    "doubling by a set block": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set t %}{{ n.x }}{{ n.x }}"
    "{% endset %}{% set n.x = t %}{% endfor %}",
    "doubling lists": repeat("n.x + n.x", start="[1]"),
    "doubling lists in lists": repeat("[n.x, n.x]", start="[1]"),
    "doubling dicts in dicts": repeat("{'a': n.x, 'b': n.x}", start="{}"),
    "doubling, printed": "{% set n = namespace(x=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "doubling, a namespace printed": "{% set n = namespace(x=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x ~ n }}",
    "doubling, compared": "{% set n = namespace(x=[], y=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "doubling, found": "{% set n = namespace(x=[], y=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x in [n.y] }}{{ [n.x] | select('eq', n.y) | list }}",
    "doubling, in JSON": repeat("[n.x, n.x]", start="[]").replace("string", "tojson"),
    "doubling, a key": repeat("(n.x, n.x)", start="()").replace("{{", "{% set d = {n.x: 1} %}{{"),
    "doubling, looked up": repeat("(n.x, n.x)", start="()").replace("{{", "{{ messages[n.x] }}{{"),
    "hashes": "{% set t = range(9999) | list %}" + LOOP + "{{ {}.get((t, t)) }}{% endfor %}",
    "JSON with wide separators": "{{ range(9999) | list | tojson(separators=('a' * 9999, ':')) }}",
    "JSON with a wide indent": "{{ range(9999) | list | tojson(indent=10**6) }}",
    "indent": "{{ 'a\\na' | indent(10**9) }}",
    "indent with a text": "{{ ('a\\n' * 9999) | indent('b' * 9999) }}",
    "wide joins": "{{ range(9999) | join('b' * 9999) }}",
    "wide joins of what is made": "{{ range(9999) | map('string') | join('b' * 9999) }}",
    "strips": "{{ ('a' * 300000).strip('b' * 99999 ~ 'a') }}",
    "wordwrap": "{{ ('a' * 99999) | wordwrap(1) }}",
    "batch": "{{ [1] | batch(10**8, 'x') | list }}",
    "slice": "{{ [1] | slice(10**8, 'x') | list }}",
    "urlize": "{{ ('a.com ' * 9999) | urlize }}",
    "sums": "{{ range(9999) | map('list') | sum(start=[]) }}",
    "slices in loops": "{% set t = range(9999) | list %}" + LOOP + "{% set u = t[1:] %}{% endfor %}",
    "texts found in loops": "{% set t = 'a' * 99999 %}" + LOOP + "{% set u = 'b' in t %}{% endfor %}",
    "many arguments": "{% macro f() %}{{ varargs[0] }}{% endmacro %}" + LOOP + "{{ f(*range(9999)) }}{% endfor %}",
    "strftime": "{{ strftime_now('%c' * 99999) }}",
    "strftime, wide": "{{ strftime_now('%1000000000Y') }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(50) }}",
    "a macro that is its own caller": "{% macro f() %}{% call f() %}{% endcall %}{{ caller() }}"
    "{% endmacro %}{{ f() }}",
    "nested ifs": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "nested ifs, a few": "{% if a %}" * 150 + "{% endif %}" * 150,
    "nested brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "nested lists": "{{ " + "[" * 300 + "1" + "]" * 300 + " }}",
    "nested loops of a few": "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
    "long sums": "{{ " + "+".join(["1"] * 30_000) + " }}",
    "many parts": "{{ a }}" * 12_000,
    "many branches": "{% if a %}{% elif b %}" + "{% elif c %}" * 6_000 + "{% endif %}",
    "long": " " * 200_000,
    "spaces in tags": "{%" + " " * 99_000,
    "many comments": "{#" * 49_000,
    "raw without an end": "{% raw %}" * 11_000,
    "a block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "an include": "{% include '/etc/hostname' %}",
    "an import": "{% import 'a' as a %}",
    "an import of names": "{% from 'a' import b %}",
    "extends": "{% extends 'a' %}",
    "an unknown tag": "{% debug %}",
    "autoescape": "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "no Jinja": "{% for %}",
    "a division by nothing": "{{ 1 / 0 }}",
    "an attribute of Python": "{{ ''.__class__.__mro__ }}",
    "a name of Python in a namespace": "{% set n = namespace(__html__=1) %}",
    "a name of Python in a namespace, later": "{% set n = namespace() %}{% set n.__html__ = 1 %}",
    "an error of many lines": "{{ raise_exception('a\\nb' * 9999) }}",
    "an error of a list": "{{ raise_exception(range(9999) | list) }}",
    "unknown names": "{{ messages | nobody }}",
}
"""What each of them holds beside writing messages."""
ALMOST = {
    "loops": "{% for a in range(9999) %}{% set b = a %}{% endfor %}",
    "lists": "{% for a in range(300) %}{% set b = range(100) | list %}{% endfor %}",
    "texts": "{% for a in range(40) %}{% set b = ('a' * 9000).replace('b', 'c').split('d') %}{% endfor %}",
    "sorted texts": "{% for a in range(20) %}{% set b = range(900) | map('string') | sort | join %}{% endfor %}",
    "JSON": "{% for a in range(20) %}{% set b = range(900) | list | tojson(indent=1) %}{% endfor %}",
    "macros": "{% macro f(x) %}{{ x }}{% endmacro %}{% for a in range(4000) %}{% set b = f(a) %}{% endfor %}",
    "numbers": "{% for a in range(4000) %}{% set b = 9 ** 3000 * 9 ** 3000 %}{% endfor %}",
    "text of the template": "{% for a in range(30) %}{% set t %}" + "x" * 20_000 + "{% endset %}{% endfor %}",
}
"""What a template does within its steps, and it is rendered up to 25 times."""


def measure_peak() -> int:
    """Bytes of this process at most, since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def try_template(processor: AnyLlavaProcessor, template: str) -> dict[str, Any]:
    """What becomes of a conversation in a template."""
    processor.chat_template = template
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = measure_peak(), time.process_time()
    try:
        processor.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=True)
        result = "written"
    except ValueError as error:
        result = f"{type(error).__name__}: {error}"
    except BaseException as error:
        result = f"uncaught {type(error).__name__}: {str(error)[:200]}"
    return {"result": result, "seconds": time.process_time() - start, "bytes": measure_peak() - before}


def main() -> None:
    processor = tiny_processor()
    try_template(processor, WRITE)
    for name in json.load(sys.stdin):
        template = (HOSTILE | ALMOST)[name] + WRITE
        sys.stdout.write(json.dumps({"name": name, **try_template(processor, template)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
