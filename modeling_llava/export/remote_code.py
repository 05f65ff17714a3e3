"""The code that a repository carries for those who load it with `trust_remote_code=True` and without this package.

What is surprising: both packages lie flat side by side, because transformers looks for such code in one folder and
follows relative imports of one dot (transformers 5.23, dynamic_module_utils.py). The two mixins that read the layouts
of other code are left empty, which halves what a stranger has to read before trusting it; so are lists of arguments,
results and errors, which the package has.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import processing_llava
from processing_llava.transformers_versions import FIRST, LAST

PACKAGES = (Path(__file__).parents[1], Path(processing_llava.__file__).parent)
ENTRY_MODULES = ("modeling_llava", "processing_llava")
"""Everything else is found by following their imports."""
_MODEL = "modeling_llava.AnyLlavaForConditionalGeneration"
_PROCESSOR = {
    "AutoImageProcessor": "image_processing_llava.AnyLlavaImageProcessorPil",
    "AutoProcessor": "processing_llava.AnyLlavaProcessor",
}
AUTO_MAP = _PROCESSOR | {
    "AutoConfig": "configuration_llava.AnyLlavaConfig",
    "AutoModel": "modeling_llava.AnyLlavaModel",
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}
SEAMS = {
    "checkpoint_mixin": (
        'class CheckpointMixin:\n    """Empty: the package reads and writes the layouts of other code here."""\n'
    ),
    "original_processor": (
        "from transformers.processing_utils import ProcessorMixin\n\n\n"
        "class OriginalProcessorMixin(ProcessorMixin):\n"
        '    """Empty: the package reads folders of the original LLaVA here."""\n'
    ),
}
_SECTIONS = re.compile(r'\n\n( +)(?:Args|Returns|Raises):\n(?:(?: *|\1 +.*|\1(?:Args|Returns|Raises):)\n)*\1"""')
_SIBLING = re.compile(r"^from (?:\.|(?:modeling|processing)_llava\.)(?:\w+\.)*(\w+) import", flags=re.MULTILINE)


def write_remote_code(folder: Path) -> None:
    """Put the code beside a saved model and processor, and name it in their configurations."""
    first, last = (".".join(map(str, tested)) for tested in (FIRST, LAST))
    header = (
        f"# AnyLLaVA {version('anyllava')}, Apache-2.0; for trust_remote_code=True. Copied by `llava export`.\n"
        f"# Tested with transformers {first} to {last}.\n"
    )
    for name, text in collect_modules().items():
        (folder / f"{name}.py").write_text(header + text, encoding="utf-8")
    _update(folder / "config.json", AUTO_MAP)
    _update(folder / "processor_config.json", _PROCESSOR)


def collect_modules() -> dict[str, str]:
    """The text of every module of the bundle by name, importing nothing but siblings and installed libraries."""
    modules: dict[str, str] = {}
    waiting = list(ENTRY_MODULES)
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        text = SEAMS.get(name) or _SECTIONS.sub(r'\n\1"""', _read_module(name))
        waiting += _SIBLING.findall(text)
        modules[name] = _SIBLING.sub(r"from .\1 import", text)
    return modules


def _read_module(name: str) -> str:
    return next(path.read_text(encoding="utf-8") for path in (p / f"{name}.py" for p in PACKAGES) if path.is_file())


def _update(path: Path, auto_map: dict[str, str]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["auto_map"] = auto_map
    if "image_processor" in fields:
        fields["image_processor"]["auto_map"] = auto_map
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
