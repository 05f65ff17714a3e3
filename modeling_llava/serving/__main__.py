"""`python -m modeling_llava.serving MODEL ...`: `transformers serve`, for models of this package, with its options.

The server looks for a model's class in transformers alone (transformers 5.23, cli/serving/model_manager.py), so the
import that registers ours comes first here. What is surprising: whatever is wrong with a request would become status
500 (transformers 5.23, cli/serving/server.py). It is the sender's fault and becomes 400.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from transformers.utils import logging

import modeling_llava  # noqa: F401  (registers the classes)
from modeling_llava.commands.errors import one_line
from processing_llava.messages import check_messages, shorten

logger = logging.get_logger(__name__)

INSTALL = "pip install 'transformers[serving]'"
MALFORMED = (AttributeError, LookupError, TypeError, ValueError)
"""What transformers raises where a request lacks a field or has one of another type."""


def main() -> None:
    """Serve until somebody ends it."""
    try:
        from transformers.cli.serving import server
        from transformers.cli.transformers import main as run_transformers

        # `transformers serve` looks the function up when it starts (transformers 5.23, cli/serve.py).
        server.build_server = refuse_with_400(server.build_server)
        sys.argv = ["transformers", "serve", *sys.argv[1:]]
        run_transformers()
    except ImportError as error:
        sys.exit(f"got no server ({one_line(error)}); expected what it needs: {INSTALL}")


def refuse_with_400(build_server: Callable) -> Callable:
    """The same `build_server`, whose app tells the sender what was wrong with a request."""

    @functools.wraps(build_server)
    def build(*args, **kwargs):
        from fastapi import Request
        from fastapi.responses import JSONResponse

        app = build_server(*args, **kwargs)

        def answer(message: str) -> JSONResponse:
            return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

        async def refuse(request: Request, error: Exception) -> JSONResponse:
            message = one_line(error)
            if isinstance(error, ValueError) and "got " in message:
                return answer(message)
            # A fault of the server looks the same.
            logger.warning("a request was refused", exc_info=error)
            found = f"{type(error).__name__}: {message}"
            return answer(f"got a request that cannot be read ({found}); expected that of OpenAI's API: correct it")

        @app.middleware("http")
        async def check(request: Request, call_next: Callable):
            try:
                if request.url.path in CHECKS and request.method == "POST":
                    CHECKS[request.url.path](json.loads(await request.body()))
            except ValueError as error:
                return answer(one_line(error))
            return await call_next(request)

        for kind in MALFORMED:
            app.add_exception_handler(kind, refuse)
        return app

    return build


def check_chat(body: Any) -> None:
    """Refuse what is no request for an answer in a conversation.

    Raises:
        ValueError: naming the field.
    """
    _check_stop(body)
    check_messages(body.get("messages"))


def check_completion(body: Any) -> None:
    """Refuse what is no request to go on with a text.

    Raises:
        ValueError: naming the field; also for an image placeholder, since no image can be sent here.
    """
    _check_stop(body)
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"got prompt={shorten(prompt)}; expected a text: correct it")
    if "<image>" in prompt:
        raise ValueError("got a prompt with <image>; expected text alone: send pictures to /v1/chat/completions")


CHECKS = {"/v1/chat/completions": check_chat, "/v1/completions": check_completion}


def _check_stop(body: Any) -> None:
    if not isinstance(body, dict):
        raise ValueError(f"got the request {shorten(body)}; expected an object: correct it")
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) else [stop]
    if stop is not None and not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"got stop={shorten(stop)}; expected a text or a list of texts: correct it")


if __name__ == "__main__":
    main()
