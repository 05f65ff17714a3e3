"""How long rows are in tokens, and what becomes of those that are too long: never cut, but kept, dropped or split.

A split conversation goes on in further rows. Each begins with the system message and with every image that the
conversation has shown before it, in front of its first question, so that later questions keep what they talk about.
A question and its answer stay together: if they are too long on their own, they are dropped. So is a question at the
end that nobody answered. What is surprising: an image is counted from its header, since its tokens follow from its
size; the model is not needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits
from processing_llava.image_loading import ImageSource, naming_source, open_picture, open_source
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import encode_prompt
from processing_llava.user_text import compile_literals

from .data_bounds import RefusedRecord

TOO_LONG = ("keep", "drop", "split")
"""What can become of a row longer than the limit: it stays as it is, it goes, or it becomes several."""

ON_BAD_ROW = ("raise", "skip")
"""What can become of a row that cannot be trained on."""

FITS, KEPT, PART, DROPPED = "fits", "too long, kept", "part of one too long", "too long, dropped"
SKIPPED = "cannot be used, skipped"
"""What became of a row."""

CUT = "first turn of the assistant left out"
SPELLED = "special tokens spelled in characters, since people wrote them; learn_tokens names those of answers"
"""Both counted beside what else became of the row."""


@dataclass(frozen=True)
class MeasuredRow:
    """A row and what it costs."""

    row: dict[str, Any]
    num_tokens: int
    """Its length, image features counted."""
    num_supervised: int
    """Tokens that are learned."""
    fate: str = FITS
    """`FITS`, `KEPT` or `PART`."""


def check_length_options(max_length: int | None, too_long: str) -> None:
    """Refuses what is no limit and no choice.

    Raises:
        ValueError: naming the option.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"got max_length={max_length}; expected at least 1 token; leave it out for no limit")
    if too_long not in TOO_LONG:
        raise ValueError(f"got too_long={too_long!r}; expected one of {', '.join(TOO_LONG)}")


def find_spelled_tokens(
    messages: Sequence[dict[str, Any]], special_tokens: Sequence[str], learn_tokens: Sequence[str]
) -> list[str]:
    """The special tokens that a row of `convert_record` holds as text: in answers, those that are not learned."""
    pattern = compile_literals(tuple(special_tokens))
    if pattern is None:
        return []
    found = [
        token
        for message in messages
        for item in message["content"]
        if item["type"] == "text"
        for token in pattern.findall(item["text"])
        if message["role"] != "assistant" or token not in learn_tokens
    ]
    return list(dict.fromkeys(found))


def read_image_sizes(row: dict[str, Any], *, decode: bool, limits: ImageLimits) -> list[tuple[int, int]]:
    """(height, width) in pixels of the images of a row.

    Args:
        row: From `convert_record`.
        decode: Read all pixels, to be sure that they can be read, instead of headers alone.
        limits: What is refused; those of the image processor that will load the images.

    Raises:
        RefusedRecord: if an image is missing, or cannot be read.
    """
    sizes = []
    for number, image in enumerate(row["images"], start=1):
        try:
            if decode:
                with open_picture(image, limits=limits, need=lambda height, width: (1, 1, 0)) as picture:
                    sizes.append((picture.height, picture.width))
            else:
                sizes.append(read_image_size(image, limits=limits))
        except FileNotFoundError as error:
            reason, problem = "missing image", error
        except (ValueError, OSError) as error:
            reason, problem = "unreadable image", error
        else:
            continue
        place = f"picture {number} of {len(row['images'])}: " if len(row["images"]) > 1 else ""
        raise RefusedRecord(
            row["id"],
            reason,
            f"an image that cannot be opened ({place}{problem})",
            "expected a picture; correct the record",
        ) from problem
    return sizes


def read_image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `load_image` would give, from the header: damaged pixels go unseen.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: as `load_image`, except for pixels that cannot be decoded.
    """
    with naming_source(source):
        image, _, orientation, _ = open_source(source, limits=limits)
    # Orientations from 5 on exchange the sides.
    return image.size if orientation >= 5 else image.size[::-1]


def measure_row(
    row: dict[str, Any], processor: AnyLlavaProcessor, image_sizes: Sequence[tuple[int, int]]
) -> MeasuredRow:
    """Counts the tokens that training on a row takes.

    Args:
        row: From `convert_record`.
        processor: The model's.
        image_sizes: (height, width) in pixels of each image.

    Raises:
        RefusedRecord: if the format cannot write the conversation, or there is nothing to learn in it.
    """
    try:
        ids, mask = encode_prompt(
            processor.render(row["messages"]),
            processor.tokenizer,
            image_token=processor.image_token,
            image_token_id=processor.image_token_id,
            num_image_tokens=processor._get_num_multimodal_tokens(list(image_sizes))["num_image_tokens"],
        )
    except (TemplateError, ValueError) as error:
        raise RefusedRecord(
            row["id"],
            "not for this format",
            f"a conversation that cannot be written ({error})",
            "expected one that fits the template; take the record out or choose another template",
        ) from error
    if not any(mask):
        raise RefusedRecord(
            row["id"],
            "nothing to learn",
            "no token to learn",
            "expected an answer inside {% generation %}; check that somebody answers, and the chat template",
        )
    return MeasuredRow(row, len(ids), sum(mask))


def fit_row(
    row: dict[str, Any],
    processor: AnyLlavaProcessor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    max_length: int | None,
    too_long: str,
) -> tuple[list[MeasuredRow], list[RefusedRecord]]:
    """The rows that a row becomes, and what is left out of it.

    Args:
        row: From `convert_record`.
        processor: The model's.
        image_sizes: (height, width) in pixels of each image.
        max_length: Longest row in tokens.
        too_long: One of `TOO_LONG`. Parts have the id of the row with `#1`, `#2`, ... behind it.

    Raises:
        RefusedRecord: as `measure_row`.
    """
    measured = measure_row(row, processor, image_sizes)
    if max_length is None or measured.num_tokens <= max_length:
        return [measured], []
    if too_long == "keep":
        return [replace(measured, fate=KEPT)], []
    remedy = f"expected at most {max_length}; raise max_length or take the record out"
    if too_long == "drop":
        return [], [RefusedRecord(row["id"], "too long", f"{measured.num_tokens} tokens", remedy)]

    def measure_part(part: dict[str, Any]) -> MeasuredRow:
        return measure_row(part, processor, image_sizes[: len(part["images"])])

    parts, left_out = split_row(row, lambda part: measure_part(part).num_tokens <= max_length)
    refused = [
        RefusedRecord(row["id"], "question and answer too long", f"too many tokens in question {number}", remedy)
        for number in left_out
    ]
    return [replace(measure_part(part), fate=PART) for part in parts], refused


def split_row(row: dict[str, Any], fits: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], list[int]]:
    """Cuts a conversation between answer and question into the fewest rows that fit.

    Returns:
        The rows, and the numbers (from 1) of the questions that do not fit on their own.
    """
    messages = row["messages"]
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    exchanges = list(zip(turns[::2], turns[1::2]))

    def build(first: int, stop: int) -> dict[str, Any]:
        num_before = _count_images(exchanges[:first])
        num_images = num_before + _count_images(exchanges[first:stop])
        (question, answer), *others = exchanges[first:stop]
        content = [{"type": "image"}] * num_before + question["content"]
        own = [{**question, "content": content}, answer, *(turn for exchange in others for turn in exchange)]
        return {**row, "images": row["images"][:num_images], "messages": system + own}

    parts, left_out = [], []
    first, stop = 0, 0
    while stop < len(exchanges):
        if fits(build(first, stop + 1)):
            stop += 1
        elif first < stop:
            parts.append(build(first, stop))
            first = stop
        else:
            first = stop = stop + 1
            left_out.append(stop)
    if first < stop:
        parts.append(build(first, stop))
    return [{**part, "id": f"{row['id']}#{number}"} for number, part in enumerate(parts, start=1)], left_out


def _count_images(exchanges: Sequence[tuple[dict[str, Any], ...]]) -> int:
    return sum(item["type"] == "image" for exchange in exchanges for turn in exchange for item in turn["content"])
