"""How many files of this project run in a command: what somebody reads who follows it from end to end.

    python -m benchmarks.hops

A file counts if a function of it is called; that it is imported does not count. `llava ask`, a LoRA `llava train` and
`llava export` are run on the embedded model.
"""

import inspect
import json
import sys
import tempfile
import threading
from pathlib import Path

from modeling_llava.inference import EMBEDDED_MODEL
from spaces_demo.command_line import main

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "spaces_demo" / "examples" / "twemoji-penguin.png"
PACKAGES = tuple(f"{ROOT / name}/" for name in ("modeling_llava", "processing_llava", "hub_cards", "spaces_demo"))


def list_files(arguments: list[str]) -> list[str]:
    """The files of the project of which a function runs in a command.

    Raises:
        RuntimeError: if the command fails.
    """
    files: set[str] = set()

    def note(frame, event, argument) -> None:
        # Bodies of modules and classes, and what they call, run when a file is imported.
        runs = frame.f_code.co_flags & inspect.CO_OPTIMIZED and frame.f_back.f_code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and runs and frame.f_code.co_filename.startswith(PACKAGES):
            files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        code = main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if code:
        raise RuntimeError(f"llava {arguments[0]} ended with {code}")
    return sorted(str(Path(file).relative_to(ROOT)) for file in files)


def write_recipe(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A penguin."}]
    rows = [{"id": str(index), "image": PICTURE.name, "conversations": turns} for index in range(2)]
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "stage": "lora",
        "model": EMBEDDED_MODEL,
        "data": [{"path": str(folder / "rows.json"), "image_folder": str(PICTURE.parent)}],
        "output_dir": str(folder / "adapter"),
        "max_length": 512,
        "tokens_per_batch": 1024,
        "trainer": {"max_steps": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "llava ask": ["ask", str(PICTURE), "What is this?"],
            "llava train (LoRA)": ["train", str(write_recipe(folder))],
            "llava export": f"export {EMBEDDED_MODEL} --out {folder / 'out'} --repo-id me/tiny "
            "--license apache-2.0 --base-model facebook/dinov2-small".split(),
        }
        found = {command: list_files(arguments) for command, arguments in commands.items()}
    for command, files in found.items():
        print(f"{command}: {len(files)} files")
        if "--list" in sys.argv:
            print("\n".join(f"  {file}" for file in files))
