"""`llava serve`: OpenAI's API on this machine, until somebody ends it; running answers are finished first."""

import argparse
import os
import socket
import sys

THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
KEYS_VARIABLE = "LLAVA_API_KEY"
MAX_CONNECTIONS = 512


def run_serve(options: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        ValueError: if an option is wrong or the first model cannot be loaded.
    """
    keys = _check_options(options)
    # Before the model is loaded, which takes longer than to see that the port is taken.
    with _listen(options.host, options.port) as listening:
        return _serve(options, keys, listening)


def _check_options(options: argparse.Namespace) -> list[str]:
    """The keys."""
    keys = options.api_key or list(filter(None, [os.environ.get(KEYS_VARIABLE)]))
    if not all(key.isprintable() and key.strip() == key != "" for key in keys):
        raise ValueError("got an --api-key that is empty or has white space around it; expected letters and digits")
    if not keys and options.host not in THIS_MACHINE:
        raise ValueError(
            f"got --host {options.host} without --api-key; expected a key where others can reach the server: "
            f"--api-key KEY, or {KEYS_VARIABLE} in the environment"
        )
    for name in ("max_rows", "max_cache_tokens", "max_new_tokens", "queue", "timeout"):
        if getattr(options, name) < (0 if name == "queue" else 1):
            raise ValueError(f"got --{name.replace('_', '-')} {getattr(options, name)}; expected 1 or more")
    return keys


def _serve(options: argparse.Namespace, keys: list[str], listening: socket.socket) -> int:
    import uvicorn

    from modeling_llava.inference.loading import parse_memory
    from modeling_llava.serving.openai_requests import RequestLimits
    from modeling_llava.serving.openai_server import build_server
    from modeling_llava.serving.served_models import ServedModels
    from processing_llava.data.image_urls import UrlPolicy

    from .answering import read_image_limits

    hosts = [name.lower() for name in options.allow_image_host]
    models = ServedModels(
        options.model,
        device=options.device,
        memory=None if options.memory is None else parse_memory(options.memory),
        max_rows=options.max_rows,
        max_cache_tokens=options.max_cache_tokens,
        max_waiting=options.queue,
        limits=read_image_limits(options.image_limit),
        urls=UrlPolicy(hosts=hosts) if hosts else None,
        dtype=options.dtype,
        quantization=options.quantization,
    )
    most = options.max_new_tokens
    app = build_server(
        models,
        keys=keys,
        # Whoever has a key may come by any name; without one, a name that leads here could be a web page's.
        hosts=None if keys else lambda: [name.lower() for name in options.allow_host],
        limits=RequestLimits(max_new_tokens=most, default_new_tokens=min(most, RequestLimits.default_new_tokens)),
        max_seconds=options.timeout,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
    )
    models.load(models.names[0])
    address = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{', '.join(models.names)} at http://{address}:{listening.getsockname()[1]}/v1", flush=True)
    if not keys:
        print("no key is needed on this machine: --api-key sets one", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address.

    Raises:
        ValueError: if it is taken, or not of this machine.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(
            f"got --host {host} --port {port} ({error}); expected a free port at an address of this machine: choose "
            "another"
        ) from None
    return listening
