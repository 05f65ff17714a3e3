"""Features of a frozen vision tower on disk: every distinct image is decoded and encoded once for all epochs.

    DIR/<key of tower and preprocessing>/features.f16   one block [P, V] after another
    DIR/<key of tower and preprocessing>/positions.json  SHA-256 of an image's bytes -> number of its block

Nothing stale can be served: other weights, feature layers, preprocessing or dtype have another folder, and an image
that changed has another digest. What is kept is what the projector takes, so that it still trains.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging

from processing_llava import AnyLlavaProcessor
from processing_llava.data.data_bounds import RefusedRecord
from processing_llava.data.row_lengths import read_image_sizes

from .run_folder import write_whole

logger = logging.get_logger(__name__)

BATCH_SIZE = 64
"""Images that the tower encodes together."""


class FeatureCache:
    """Looks up the tower features of images, after `add` has encoded them.

    Args:
        model: Its tower encodes; it must not train.
        processor: Its image processor prepares one tile for each image.
        folder: Where features are kept; several towers can share it.
        bf16: Encode in bfloat16, as a run with `bf16: true` would.

    Raises:
        ValueError: if images are cut into tiles, whose number differs from image to image.
    """

    def __init__(
        self, model: PreTrainedModel, processor: AnyLlavaProcessor, folder: str | Path, *, bf16: bool = False
    ) -> None:
        if model.config.image_grid_pinpoints is not None:
            raise ValueError(
                "got feature_cache for a model with image_grid_pinpoints; expected one tile for each picture; take "
                "feature_cache out of the recipe"
            )
        self.model = model
        self.processor = processor
        self.bf16 = bf16
        self.folder = Path(folder) / self._make_key()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.positions: dict[str, int] = {}
        self.num_blocks = 0
        """Blocks in the file, with the gaps that unreadable images leave."""
        self.digests: dict[Path, str] = {}
        num_features = model.config.patches_per_side**2 + model.config.num_prefix_tokens
        self.shape = (num_features, model.config.vision_feature_size)

    def add(self, rows: Iterable[dict[str, Any]], *, on_bad_row: str = "raise") -> None:
        """Encode the images of rows that are not cached yet; the processes of a run share the work.

        Another run with the same folder waits until this one is done.

        Args:
            rows: From `convert_record`.
            on_bad_row: "raise", or "skip" images that cannot be read; `read` refuses them.

        Raises:
            RefusedRecord: naming the row with an image that cannot be read.
        """
        rank, num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with FileLock(self.folder / "lock") if rank == 0 else contextlib.nullcontext():
            _wait_for_all()
            self._add(rows, on_bad_row=on_bad_row, rank=rank, num_processes=num_processes)
            _wait_for_all()

    def _add(self, rows: Iterable[dict[str, Any]], *, on_bad_row: str, rank: int, num_processes: int) -> None:
        path = self.folder / "positions.json"
        self.positions = json.loads(path.read_text()) if path.exists() else {}
        # Rows of one image each, so that a fault names its row.
        images = {
            self._digest(image): {"id": row["id"], "images": [image]}
            for row in rows
            if self._can_read(row, decode=False, on_bad_row=on_bad_row)
            for image in row["images"]
        }
        missing = [digest for digest in images if digest not in self.positions]
        logger.warning(f"{len(images):,} pictures, {len(missing):,} of them not yet in {self.folder}")
        first = 1 + max(self.positions.values(), default=-1)
        blocks = self.folder / "features.f16"
        blocks.touch()
        written: dict[str, int] = {}
        # Blocks that an interrupted run wrote have no position and are written over.
        with blocks.open("r+b") as file:
            for start in range(rank * BATCH_SIZE, len(missing), num_processes * BATCH_SIZE):
                batch = {digest: images[digest] for digest in missing[start : start + BATCH_SIZE]}
                features = self._encode_readable(batch, on_bad_row=on_bad_row)
                file.seek((first + start) * math.prod(self.shape) * 2)
                for number, (digest, features_PV) in enumerate(features.items()):
                    file.write(features_PV.numpy().tobytes())
                    written[digest] = first + start + number
        for part in _gather(written):
            self.positions |= part
        self.num_blocks = 1 + max(self.positions.values(), default=-1)
        if rank == 0:
            write_whole(path, json.dumps(self.positions))

    def read(self, images: list[Path | str | bytes]) -> torch.Tensor:
        """Features of images that were added, `[I, P, V]` in float32.

        Raises:
            ValueError: if one of them could not be read.
        """
        digests = [self._digest(image) for image in images]
        if not self.positions.keys() >= set(digests):
            raise ValueError("got a picture without features; expected one that could be read; correct its row")
        # Mapped anew each time: a map that stays open cannot be sent to the workers of a data loader.
        blocks = np.memmap(self.folder / "features.f16", np.float16, "r", shape=(self.num_blocks, *self.shape))
        return torch.from_numpy(blocks[[self.positions[digest] for digest in digests]]).float()

    def _digest(self, image: Path | str | bytes) -> str:
        if not isinstance(image, Path):
            # A text is a data URI: what it says is the image.
            return hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()
        if image not in self.digests:
            self.digests[image] = hashlib.sha256(image.read_bytes()).hexdigest()
        return self.digests[image]

    def _can_read(self, row: dict[str, Any], *, decode: bool, on_bad_row: str) -> bool:
        try:
            read_image_sizes(row, decode=decode, limits=self.processor.image_processor.limits)
        except RefusedRecord:
            if on_bad_row == "raise":
                raise
            return False
        return True

    def _encode_readable(self, batch: dict[str, dict[str, Any]], *, on_bad_row: str) -> dict[str, torch.Tensor]:
        """Features `[P, V]` of the images that can be read, by digest."""
        try:
            return dict(zip(batch, self._encode([image for row in batch.values() for image in row["images"]]).cpu()))
        except (OSError, ValueError):
            # Rare enough to look at each image on its own.
            readable = {
                digest: row for digest, row in batch.items() if self._can_read(row, decode=True, on_bad_row=on_bad_row)
            }
            if len(readable) == len(batch):
                raise
        return self._encode_readable(readable, on_bad_row=on_bad_row) if readable else {}

    @torch.no_grad()
    def _encode(self, images: list[Path | str | bytes]) -> torch.Tensor:
        pixel_values = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.model.select_features(self.model.model.run_tower(pixel_values)).half()

    def _make_key(self) -> str:
        key = hashlib.sha256()
        for name, tensor in self.model.model.vision_tower.state_dict().items():
            key.update(name.encode())
            key.update(tensor.float().cpu().numpy().tobytes())
        images = self.processor.image_processor
        settings = [self.model.config.vision_config.to_dict(), type(images).__name__, images.to_dict()]
        settings += [self.model.config.vision_feature_layers, self.model.config.num_prefix_tokens, self.bf16]
        key.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return key.hexdigest()[:16]


def _gather(written: dict[str, int]) -> list[dict[str, int]]:
    """What every process of the run has written, once all have come here."""
    if not dist.is_initialized():
        return [written]
    parts: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, written)
    return parts


def _wait_for_all() -> None:
    """Return when all processes of the run have come here."""
    if dist.is_initialized():
        dist.barrier()
