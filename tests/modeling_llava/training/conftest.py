"""A small real run: pictures of colours, rows about them, a model to start from, and recipes for it."""

import json
import tempfile
from pathlib import Path

import PIL.Image
import pytest
import yaml

from tests.tiny import PINPOINTS, save_tiny_checkpoint, tiny_model, tiny_processor

COLORS = {"red": "Red.", "blue": "Blue.", "white": "White."}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    records = []
    for index, (color, answer) in enumerate(COLORS.items()):
        PIL.Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        conversations = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(index), "image": f"{color}.png", "conversations": conversations})
    (folder / "rows.json").write_text(json.dumps(records * 4))
    save_tiny_checkpoint(folder / "start")
    return folder


@pytest.fixture(scope="module")
def tiled_start(workspace) -> Path:
    """A model that cuts pictures into tiles, and has an `image_newline`."""
    tiles = {"image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"}
    processor = tiny_processor(image_aspect_ratio="anyres", **tiles)
    tiny_model(image_token_id=processor.image_token_id, **tiles).save_pretrained(workspace / "tiled_start")
    processor.save_pretrained(workspace / "tiled_start")
    return workspace / "tiled_start"


def write_recipe(folder: Path, **fields) -> Path:
    recipe = {
        "stage": "finetune",
        "model": str(folder / "start"),
        "data": [{"path": str(folder / "rows.json"), "image_folder": str(folder)}],
        "output_dir": tempfile.mkdtemp(dir=folder),
        "trainer": {"learning_rate": 3e-3, "per_device_train_batch_size": 6, "max_steps": 2, "disable_tqdm": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | fields))
    return path
