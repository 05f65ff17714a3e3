"""FeedbackFile: what visitors think of answers, kept only where the operator names a file."""

import json
import time
from pathlib import Path
from threading import Lock

from .conversation import Conversation

OPTIONS = ("Like", "Dislike", "Wrong", "Harmful")
MAX_BYTES = 50_000_000


class FeedbackFile:
    """JSON Lines with question, answer and opinion; no pictures, and nothing about who it was.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        # A new file is its owner's alone.
        self.path.touch(mode=0o600)
        self._lock = Lock()

    def write(self, conversation: Conversation, *, turn: int, column: int, opinion: str) -> None:
        """Add one line, unless the same opinion was stored last: Gradio 6.31 tells some of them twice.

        Raises:
            ValueError: if there is no such answer, or the file is full.
        """
        if opinion not in OPTIONS or not 0 <= turn < len(conversation.turns):
            raise ValueError(f"got opinion {opinion!r} on turn {turn}; expected one of {', '.join(OPTIONS)}")
        asked = conversation.turns[turn]
        answer = asked.choose_answer(column)
        if answer is None:
            raise ValueError(f"got an opinion on turn {turn}, which has no answer; expected one that has")
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": answer.model,
            "opinion": opinion,
            "num_pictures": len(asked.pictures),
            "question": asked.question,
            "answer": answer.text,
        }
        with self._lock:
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"got a full feedback file; expected at most {MAX_BYTES} bytes")
            if answer.opinion == opinion:
                return
            answer.opinion = opinion
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
