"""`python -m modeling_llava.serving MODEL ...`: `transformers serve`, for models of this package, with its options.

The server looks for a model's class in transformers alone (transformers 5.23, cli/serving/model_manager.py), so the
import that registers ours comes first here. What is surprising: a ValueError would become status 500 (transformers
5.23, cli/serving/server.py). A request that our processor refuses is the sender's fault and becomes 400.
"""

import functools
import sys
from collections.abc import Callable

import modeling_llava  # noqa: F401  (registers the classes)


def main() -> None:
    """Serve until somebody ends it.

    Raises:
        ImportError: what `transformers serve` needs is not installed.
    """
    from transformers.cli.serving import server
    from transformers.cli.transformers import main as run_transformers

    # `transformers serve` looks the function up when it starts (transformers 5.23, cli/serve.py).
    server.build_server = refuse_with_400(server.build_server)
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    run_transformers()


def refuse_with_400(build_server: Callable) -> Callable:
    """The same `build_server`, whose app tells the sender what was wrong with a request."""

    @functools.wraps(build_server)
    def build(*args, **kwargs):
        from fastapi.responses import JSONResponse

        app = build_server(*args, **kwargs)

        async def refuse(request, error: ValueError) -> JSONResponse:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

        app.add_exception_handler(ValueError, refuse)
        return app

    return build


if __name__ == "__main__":
    main()
