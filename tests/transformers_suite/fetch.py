"""Unpacks the test mixins of the installed transformers: `python -m tests.transformers_suite.fetch`.

Wheels hold no tests, so pip is asked for the source distribution of exactly the installed version. Only the modules
at the top of its `tests` folder are kept, as a package of another name: ours is called `tests` as well.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers

from tests.conftest import ROOT

FOLDER = ROOT / "runs" / "transformers_tests" / transformers.__version__
"""Ignored by git; tests that need it are skipped where it is absent."""
PACKAGE = "transformers_tests"


def main() -> None:
    if FOLDER.is_dir():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        archive = download(Path(scratch))
        unpacked = Path(scratch, "unpacked")
        unpack(archive, unpacked / PACKAGE)
        unpacked.rename(FOLDER)


def download(folder: Path) -> Path:
    """The source distribution, from wherever this machine's pip looks for packages."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    requirement = f"transformers=={transformers.__version__}"
    subprocess.run([*pip, "--no-binary", "transformers", "--dest", folder, requirement], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    return archive


def unpack(archive: Path, package: Path) -> None:
    package.mkdir(parents=True)
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if member.isfile() and len(path.parts) == 3 and path.match("*/tests/*.py"):
                (package / path.name).write_bytes(members.extractfile(member).read())


if __name__ == "__main__":
    main()
