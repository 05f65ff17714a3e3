"""transformers' own test mixins, from the folder that `make test-transformers` unpacks.

The mixins import a few modules that the source distribution leaves out. Stand-ins take their place: empty for the
mixins among them, which therefore test nothing here, and a local picture for what would be downloaded.
"""

import base64
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import transformers

import modeling_llava
from tests.conftest import ROOT
from tests.transformers_suite.fetch import FOLDER, PACKAGE

if not FOLDER.is_dir():
    pytest.skip("needs transformers' own tests: make test-transformers downloads them", allow_module_level=True)

PICTURE = ROOT / "spaces_demo" / "examples" / "twemoji-penguin.png"


def stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


sys.path.append(str(FOLDER))
stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
# No text opens a file in our processor, so that the picture is in its address.
ADDRESS = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: ADDRESS)

# The mixins would load transformers a second time, from a source tree that is not unpacked.
with patch("transformers.utils.direct_transformers_import", lambda path: transformers):
    configuration = import_module(f"{PACKAGE}.test_configuration_common")
    image_processing = import_module(f"{PACKAGE}.test_image_processing_common")
    modeling = import_module(f"{PACKAGE}.test_modeling_common")
    processing = import_module(f"{PACKAGE}.test_processing_common")
    with tempfile.TemporaryDirectory() as folder:
        # The mixin reads which tiny checkpoints there are when it is imported; `test_pipelines.py` makes one.
        summary = Path(folder, "reports", "tiny_model_summary.json")
        summary.parent.mkdir()
        summary.write_text("{}")
        with patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=folder):
            pipelines = import_module(f"{PACKAGE}.test_pipeline_mixin")
modeling_llava.register()
