"""Rules of the layout that a reader relies on."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

HUB_FILES = {
    "processing_llava": (
        "image_arrays",
        "image_containers",
        "image_layouts",
        "image_limits",
        "image_loading",
        "image_processing_fast",
        "image_processing_llava",
        "image_tiles",
        "messages",
        "processing_llava",
        "prompt_ids",
        "prompt_inputs",
        "prompts",
        "role_markers",
        "transformers_versions",
    ),
    "modeling_llava": (
        "configuration_llava",
        "generation",
        "modeling_llava",
        "projectors",
        "vision_towers",
        "visual_tokens",
    ),
}
"""Files that are copied into Hub repositories."""
SEAMS = ("checkpoint_mixin", "original_processor")
"""Mixins that read the layouts of other code, which a Hub repository does not need: export leaves them empty."""
HUB_PACKAGES = {"torch", "transformers", "PIL", "numpy", "tokenizers", "jinja2"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, wherever in the file; siblings begin with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "processing_llava").glob("*.py")), ids=lambda path: path.name)
def test_processing_never_imports_modeling(path):
    assert not any(name.startswith("modeling_llava") for name in imported_modules(path))


@pytest.mark.parametrize("package, name", [(package, name) for package, names in HUB_FILES.items() for name in names])
def test_hub_files_import_only_what_a_hub_repository_has(package, name):
    import sys

    for module in imported_modules(ROOT / package / f"{name}.py"):
        top = module.split(".")[0]
        if module.startswith("."):
            assert module[1:] in HUB_FILES[package] + SEAMS
        elif top == "processing_llava":
            # Export rewrites this one arrow between the packages to a sibling.
            assert module.split(".")[1] in HUB_FILES["processing_llava"]
        else:
            assert top in HUB_PACKAGES | sys.stdlib_module_names, module
