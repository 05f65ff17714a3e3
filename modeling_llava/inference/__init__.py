"""A loaded model answers: one question, a conversation, or many requests at once.

What is surprising: names are imported when they are asked for, since commands that answer nothing (`llava doctor`,
`llava check-data`) import a file of this folder without the others.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "EMBEDDED_MODEL": "loading",
    "AnswerRequest": "answer_requests",
    "ChatCache": "chat_cache",
    "ChatSession": "chat_session",
    "Constraint": "constraints",
    "generate_answers": "batched_generation",
    "load_for_inference": "loading",
    "prepare_for_answering": "loading",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
