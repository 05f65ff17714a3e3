"""CPU time of commands and imports, each in a process of its own.

    python -m benchmarks.start [--rounds 5]

Help and version of `llava` beside the help of transformers' command; `import modeling_llava` beside `import torch` and
`import transformers`, each alone and added up; and our classes beside the Auto classes of models and processors, for
neither `import modeling_llava` nor `import transformers` imports a class.
"""

import resource
import subprocess
import sys

from .report import render_table
from .timing import PEER, Row, build_parser, compare, take_turns

LLAVA = "import sys; from spaces_demo.command_line import main; sys.exit(main())"
TRANSFORMERS = (
    "import sys; from importlib.metadata import entry_points; "
    "(command,) = entry_points(group='console_scripts', name='transformers'); sys.exit(command.load()())"
)
IMPORTS = {
    "modeling_llava": "import modeling_llava",
    "our classes": "from modeling_llava import AutoModelForVision2Seq",
    "torch": "import torch",
    PEER: "import transformers",
    "Auto classes": "from transformers import AutoModelForImageTextToText, AutoProcessor",
}


def run(code: str, *arguments: str) -> float:
    """Seconds of CPU time of Python code in a process of its own.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(device: str, size: str, rounds: int) -> list[Row]:
    """Rows as `benchmarks.timing` describes them, in seconds; device and size change nothing."""
    jobs = {name: lambda code=code: run(code) for name, code in IMPORTS.items()}
    jobs["transformers --help"] = lambda: run(TRANSFORMERS, "--help")
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        jobs[f"llava {' '.join(arguments)}"] = lambda arguments=arguments: run(LLAVA, *arguments)
    seconds = take_turns(jobs, rounds)
    rows = [
        compare(name, seconds[name], seconds["transformers --help"], peer_name="transformers --help")
        for name in jobs
        if name.startswith("llava ")
    ]
    ours = seconds["modeling_llava"]
    both = [sum(pair) for pair in zip(seconds["torch"], seconds[PEER])]
    rows.append(compare("import modeling_llava", ours, both, peer_name="import torch, import transformers"))
    rows.append(
        compare(
            "import of our classes",
            seconds["our classes"],
            seconds["Auto classes"],
            peer_name="import of the Auto classes",
        )
    )
    return rows


def main() -> None:
    parser = build_parser(__doc__, rounds=5)
    arguments = parser.parse_args()
    print(render_table(measure(arguments.device, arguments.size, arguments.rounds)))


if __name__ == "__main__":
    main()
