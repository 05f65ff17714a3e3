"""`--image-limit` of the commands that open pictures."""

import argparse


def add_image_limit(parser: argparse.ArgumentParser) -> None:
    """Texts for `processing_llava.image_limits.read_limits`."""
    parser.add_argument(
        "--image-limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="refuse pictures above it, e.g. max_pixels=150000000 or max_aspect_ratio=40; again for another limit",
    )
