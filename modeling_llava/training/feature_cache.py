"""Features of a frozen vision tower on disk: every distinct picture is decoded and encoded once for all epochs.

    DIR/<key of tower and preprocessing>/features.f16   one block [P, V] after another
    DIR/<key of tower and preprocessing>/positions.json  SHA-256 of a picture's bytes -> number of its block

Nothing stale can be served: other weights, feature layers, preprocessing or arithmetic have another folder, and a
picture that changed has another digest. What is kept is what the projector takes, so that it still trains.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging

from processing_llava import AnyLlavaProcessor

from .checkpoints import write_whole

logger = logging.get_logger(__name__)

BATCH_SIZE = 64


class FeatureCache:
    """Looks up the tower features of pictures, after `add` has encoded them.

    Args:
        model: Its tower encodes; it must not train.
        processor: Its image processor prepares one tile for each picture.
        folder: Where features are kept; several towers can share it.
        bf16: Encode in bfloat16, as a run with `bf16: true` would.

    Raises:
        ValueError: if pictures are cut into tiles, whose number differs from picture to picture.
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
        self.digests: dict[Path, str] = {}
        num_features = model.config.patches_per_side**2 + model.config.num_prefix_tokens
        self.shape = (num_features, model.config.vision_feature_size)

    def add(self, images: Iterable[Path | str | bytes]) -> None:
        """Encode the pictures, as rows hold them, that are not cached yet; the processes of a run share the work.

        Another run with the same folder waits until this one is done.
        """
        rank, num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with FileLock(self.folder / "lock") if rank == 0 else contextlib.nullcontext():
            _wait_for_all()
            self._add(images, rank=rank, num_processes=num_processes)
            _wait_for_all()

    def _add(self, images: Iterable[Path | str | bytes], *, rank: int, num_processes: int) -> None:
        path = self.folder / "positions.json"
        self.positions = json.loads(path.read_text()) if path.exists() else {}
        digests = {self._digest(image): image for image in images}
        missing = {digest: image for digest, image in digests.items() if digest not in self.positions}
        logger.warning(f"{len(digests):,} pictures, {len(missing):,} of them not yet in {self.folder}")
        first = len(self.positions)
        blocks = self.folder / "features.f16"
        blocks.touch()
        new_images = list(missing.values())
        # Blocks that an interrupted run wrote have no position and are written over.
        with blocks.open("r+b") as file:
            for start in range(rank * BATCH_SIZE, len(missing), num_processes * BATCH_SIZE):
                features = self._encode(new_images[start : start + BATCH_SIZE])
                file.seek((first + start) * math.prod(self.shape) * 2)
                file.write(features.cpu().numpy().tobytes())
        _wait_for_all()
        self.positions |= {digest: first + number for number, digest in enumerate(missing)}
        if rank == 0:
            write_whole(path, json.dumps(self.positions))

    def read(self, images: list[Path | str | bytes]) -> torch.Tensor:
        """Features of pictures that were added, `[I, P, V]` in float32."""
        # Mapped anew each time: a map that stays open cannot be sent to the workers of a data loader.
        blocks = np.memmap(self.folder / "features.f16", np.float16, "r", shape=(len(self.positions), *self.shape))
        return torch.from_numpy(blocks[[self.positions[self._digest(image)] for image in images]]).float()

    def _digest(self, image: Path | str | bytes) -> str:
        if not isinstance(image, Path):
            # A text is a data URI: what it says is the picture.
            return hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()
        if image not in self.digests:
            self.digests[image] = hashlib.sha256(image.read_bytes()).hexdigest()
        return self.digests[image]

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


def _wait_for_all() -> None:
    """Until all processes of the run have come here."""
    if dist.is_initialized():
        dist.barrier()
