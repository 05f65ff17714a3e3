"""This package inside of a Space that needs it.

What is surprising: it lies there as folders, not as a wheel. A Space installs its requirements before its own files
are there, so that none of them can be named, and an address of the Hub would need a public Space.
"""

import re
import shutil
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

NAME = "anyllava"
PACKAGES = ("hub_cards", "modeling_llava", "processing_llava", "spaces_demo")
_OURS = re.compile(rf"{NAME}\s*(?:\[([\w\s,-]*)\])?\s*(?:==\s*([\w.]+))?", flags=re.IGNORECASE)
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
_LEFT_OUT = ("__pycache__", "*.pyc")


def carry_package(folder: Path) -> list[str]:
    """Put this package into a Space whose requirements.txt names it, and its requirements in place of the name.

    Returns:
        What a person should know.

    Raises:
        ValueError: if another version of it is named, or one of its folders is there already.
    """
    requirements = folder / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    named = [_OURS.fullmatch(line.partition("#")[0].strip()) for line in lines]
    match = next(filter(None, named), None)
    if match is None:
        return []
    installed = distribution(NAME)
    if match[2] not in (None, installed.version):
        raise ValueError(
            f"got {NAME}=={match[2]} in requirements.txt; expected {installed.version}, which runs here and goes into "
            "the Space"
        )
    for package in PACKAGES:
        if (folder / package).exists():
            raise ValueError(f"got a Space with {package} and {NAME} in requirements.txt; expected one of them")
        source = Path(find_spec(package).origin).parent
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    # Modules beside the checkpoint build it; no installation has them.
    for builder in (folder / "modeling_llava" / "tiny_llava").glob("*.py"):
        builder.unlink()
    extras = {extra.strip() for extra in (match[1] or "").split(",")}
    kept = [line for line, ours in zip(lines, named) if ours is None]
    pinned = {_read_name(line) for line in kept}
    needed = [line for line in _list_requirements(installed.requires or [], extras) if _read_name(line) not in pinned]
    requirements.write_text("\n".join([*kept, *needed]) + "\n", encoding="utf-8")
    return [f"the Space carries {NAME} {installed.version}, which is on no package index: {', '.join(PACKAGES)}"]


def _list_requirements(lines: list[str], extras: set[str]) -> list[str]:
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        if extra is None or extra[1] in extras:
            found.append(requirement.strip())
    return found


def _read_name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]*", line.strip())[0]).lower()
