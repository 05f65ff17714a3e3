"""A finished file of answers as a CSV table, and as one page of pictures and answers.

Both are written row by row, so that their size is none of memory, and take their place when they are whole. What
strangers wrote acts in neither: the page is escaped text and small pictures without a script or an address, and a text
that a spreadsheet would compute (`=...`) begins with an apostrophe.
"""

import base64
import csv
import html
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image

from .answer_file import digest_row, read_records
from .inputs import InputRow

COLUMNS = ("key", "number", "image", "question", "answer", "error", "finish_reason", "task", "model")
THUMBNAIL_SIDE = 240
_COMPUTED = ("=", "+", "-", "@", "\t", "\r")
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0; padding: 1.5rem; background: Canvas; color: CanvasText }}
header {{ max-width: 80rem; margin: 0 auto 1.5rem }}
h1 {{ font-size: 1.3rem; margin: 0 0 .3rem }}
header p {{ margin: 0; opacity: .7 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; max-width: 80rem;
  margin: 0 auto }}
article {{ border: 1px solid color-mix(in srgb, CanvasText 18%, Canvas); border-radius: .6rem; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 22rem }}
figure {{ margin: 0; background: color-mix(in srgb, CanvasText 6%, Canvas); height: 12rem; display: flex;
  justify-content: center; align-items: center; gap: .3rem }}
img {{ max-width: 100%; max-height: 100%; object-fit: contain }}
h2 {{ font: 12px/1.4 ui-monospace, monospace; margin: .6rem .8rem 0; opacity: .7; overflow-wrap: anywhere }}
dl {{ margin: .3rem .8rem .8rem }}
dt {{ font-size: .85rem; opacity: .7; margin-top: .4rem }}
dd {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
.tag {{ display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .5rem; margin: .1rem .2rem .1rem 0;
  font-size: .85rem }}
.error {{ color: light-dark(#b00020, #ff8a80); font-size: .85rem }}
</style></head><body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
<main>
"""


def write_csv(answers: Path, path: Path) -> None:
    """The records of a file of answers as a table; lists and objects are JSON in it.

    Raises:
        ValueError: the file holds something else.
    """
    with _writing(path) as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for _, record in read_records(answers):
            table.writerow([_write_cell(record.get(name)) for name in COLUMNS])


def write_gallery(answers: Path, rows: Iterable[InputRow], path: Path, *, limits: ImageLimits) -> None:
    """One page with a card for each row that has a record, in the order of the rows.

    Raises:
        ValueError: the file holds something else.
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    num_records = num_errors = 0
    models: dict[str, None] = {}
    for offset, record in read_records(answers):
        places[digest_row(record["key"], 0)].append(offset)
        num_records += 1
        num_errors += "error" in record
        models[str(record["model"])] = None
    with _writing(path) as file, answers.open("rb") as records:
        subtitle = f"{num_records:,} answers, {num_errors:,} errors; {', '.join(models)}"
        file.write(_HEAD.format(title=html.escape(path.stem), subtitle=html.escape(subtitle)))
        for row in rows:
            found = []
            for offset in places.pop(digest_row(row.key, 0), ()):
                records.seek(offset)
                found.append(json.loads(records.readline()))
            if found:
                file.write(_build_card(row, sorted(found, key=lambda record: record["number"]), limits))
        file.write("</main>\n</body></html>\n")


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    """A new file in the place of another, if nothing goes wrong."""
    new = path.with_name(f"{path.name}.new")
    try:
        # As a CSV wants its line breaks; a page takes any. Halves of surrogate pairs are no text.
        with new.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _write_cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(_COMPUTED) else value


def _build_card(row: InputRow, records: list[dict[str, Any]], limits: ImageLimits) -> str:
    answers = "".join(f"<dt>{_escape(record['question'])}</dt>{_build_answer(record)}" for record in records)
    return (
        f"<article><figure>{_build_pictures(row, limits)}</figure><h2>{_escape(row.key)}</h2>"
        f"<dl>{answers}</dl></article>\n"
    )


def _build_answer(record: dict[str, Any]) -> str:
    if "error" in record:
        return f'<dd class="error">{_escape(record["error"])}</dd>'
    answer = record["answer"]
    if isinstance(answer, list) and all(isinstance(item, str) for item in answer):
        tags = "".join(f'<span class="tag">{_escape(item)}</span>' for item in answer)
        return f"<dd>{tags}</dd>"
    text = answer if isinstance(answer, str) else json.dumps(answer, indent=1, ensure_ascii=False)
    return f"<dd>{_escape(text)}</dd>"


def _build_pictures(row: InputRow, limits: ImageLimits) -> str:
    try:
        images = [load_image(source, limits=limits, shortest_edge=THUMBNAIL_SIDE) for source in row.list_pictures()]
    except (ValueError, OSError):
        return "no picture"
    tags = []
    for image in images:
        image = image.copy()
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=75)
        tags.append(f'<img src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">')
    return "".join(tags)


def _escape(value: Any) -> str:
    text = "" if value is None else str(value)
    # What is no character of HTML is written out.
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text))
