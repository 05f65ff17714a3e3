"""The questions and answers of the reference outputs, as messages."""

import json

from tests.conftest import GOLDENS

GOLDEN_PROMPTS = json.loads((GOLDENS / "prompts.json").read_text(encoding="utf-8"))


def golden_messages(turns: int, *, num_images: int, is_open: bool) -> list[dict]:
    """The first turns of the reference conversation; the images stand in front of the first question."""
    messages = []
    for question, answer in list(zip(GOLDEN_PROMPTS["questions"], GOLDEN_PROMPTS["answers"]))[:turns]:
        images = [{"type": "image"}] * (0 if messages else num_images)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1] if is_open else messages
