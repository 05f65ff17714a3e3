"""A loaded model answers."""

from .batched_generation import AnswerRequest, generate_answers
from .chat_cache import ChatCache
from .chat_session import ChatSession
from .loading import EMBEDDED_MODEL, load_for_inference, prepare_for_answering

__all__ = [
    "EMBEDDED_MODEL",
    "AnswerRequest",
    "ChatCache",
    "ChatSession",
    "generate_answers",
    "load_for_inference",
    "prepare_for_answering",
]
