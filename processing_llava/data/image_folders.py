"""The folder that pictures of a data set lie in: names in records lead to its files and to no others.

A record of somebody else's data set can name any file of the machine that trains on it, and a model that learned a
file can tell what was in it.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageFolder:
    """Where image paths start, and where they have to stay."""

    path: str | Path
    follow_links: bool = False
    """Symbolic links in it may lead out of it."""

    def find(self, name: str) -> Path:
        """The path of an image, which need not exist.

        Args:
            name: Relative to the folder, or absolute.

        Raises:
            ValueError: it leads out of the folder, or cannot be a path.
        """
        resolve = os.path.abspath if self.follow_links else os.path.realpath
        try:
            root = resolve(self.path)
            found = resolve(os.path.join(root, name))
        except (OSError, ValueError) as error:
            raise ValueError(f"got the image path {name[:80]!r} ({error}); expected a file; correct it") from None
        if os.path.commonpath([root, found]) != root:
            raise ValueError(
                f"got the image path {name[:80]!r}, which leads to {found[:200]}; expected a file in {root}; correct "
                "it, choose another image_folder, or allow links that you made yourself (follow_links, --follow-links)"
            )
        return Path(found)
