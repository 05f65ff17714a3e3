"""What a user can get wrong, as one line."""

PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What a path that a user gave can cause."""

EXTRAS = {
    "trl": "train",
    "peft": "train",
    "datasets": "train",
    "accelerate": "train",
    "yaml": "train",
    "gradio": "demo",
}


def missing_extra(error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        raise error
    return f"{package} is not installed; this command needs it: pip install 'anyllava[{EXTRAS[package]}]'"


def one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:
        # A worker of a data loader sends its whole traceback; the last line has the error.
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return " ".join(text.split())
