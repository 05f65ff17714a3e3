"""What stands behind the name of a model: a folder, or a repository on the Hub."""

import contextlib
from collections.abc import Iterator

from transformers import AutoProcessor

from processing_llava import AnyLlavaProcessor
from processing_llava.original.original_folder import find_installed


@contextlib.contextmanager
def explain_missing(name: str, *, part: str = "model", kind: str = " of a LLaVA") -> Iterator[None]:
    """Tell what was expected of a name under which nothing is found inside of this.

    Raises:
        ValueError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"got {part} {name!r}; expected a folder or a Hub id{kind}: {reason}") from error


def load_training_processor(
    name: str, *, template: str | None = None, backend: str | None = None
) -> AnyLlavaProcessor:
    """The processor of a model, if it tells what is learned of a conversation.

    Args:
        template: Name of a conversation format in place of the model's own.
        backend: "torch" or "pil", in place of the model's own.

    Raises:
        ValueError: if there is no such model, or its processor is transformers' own, which marks no answers.
    """
    chosen = {key: value for key, value in {"template": template, "backend": backend}.items() if value is not None}
    with explain_missing(name):
        name = find_installed(name)
        processor = AutoProcessor.from_pretrained(name, **chosen)
    if not isinstance(processor, AnyLlavaProcessor):
        raise ValueError(
            f"got model {name!r} with transformers' {type(processor).__name__}; expected one that trains: take the "
            "original checkpoint, or one of this package"
        )
    return processor
