"""Links in the folder of a model: into itself and into the Hub's cache, and nowhere else."""

import pytest
from huggingface_hub import constants

from processing_llava.original.file_checks import read_json


@pytest.mark.parametrize(
    ("place", "is_read"),
    [
        ("cache/models--them--llava/blobs/0a1b", True),
        ("model/kept/config.json", True),
        ("cache/models--them--llava/refs/main", False),
        ("cache/datasets/models--them--llava/blobs/0a1b", False),
        ("elsewhere/models--them--llava/blobs/0a1b", False),
        ("elsewhere/config.json", False),
    ],
)
def test_a_link_leads_into_the_folder_or_the_cache(tmp_path, monkeypatch, place, is_read):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    target, folder = tmp_path / place, tmp_path / "model"
    for path in (target.parent, folder):
        path.mkdir(parents=True, exist_ok=True)
    target.write_text('{"model_type": "llava"}')
    (folder / "config.json").symlink_to(target)
    if is_read:
        assert read_json(str(folder), "config.json", {}) == {"model_type": "llava"}
    else:
        with pytest.raises(ValueError, match=r"config\.json, a link out of its folder; expected a file"):
            read_json(str(folder), "config.json", {})
