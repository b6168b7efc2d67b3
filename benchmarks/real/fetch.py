"""Fetch what others trained: packages of the index at pinned hashes, of which a few files are taken.

    python -m benchmarks.real.fetch --out out/real

Nothing is installed and nothing of a package runs. Each goes into a folder of its name, with its licence.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300  # seconds of one download


class FetchError(RuntimeError):
    """What could not be fetched, and why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel of the Python package index. ``members``: the files of it that are taken, all in its own folder."""

    name: str
    version: str
    sha256: str
    licence: str
    members: tuple[str, ...]


# A DCGAN of faces, 64 px, z of 100, trained on DigiFace-1M: for tests and reports; it is not shipped.
DCGAN = Package(
    "gan_face_generate", "1.1.1", "24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569", "MIT",
    ("gan_face_generate/__init__.py", "gan_face_generate/models.py", "gan_face_generate/weights.tar",
     "gan_face_generate-1.1.1.dist-info/licenses/LICENSE"),
)
PACKAGES = {package.name: package for package in (DCGAN,)}


def fetch(package: Package, out: Path) -> Path:
    """The folder out/NAME with the members of a package; what is there already is kept. Raises FetchError."""
    folder = out / package.name
    if all((folder / member).is_file() for member in package.members):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(package, Path(temporary))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != package.sha256:
            raise FetchError(f"{wheel.name} has the sha256 {found}; expected {package.sha256}: it was not opened")
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                (folder / member).write_bytes(archive.read(member))
    return folder


def download(package: Package, folder: Path) -> Path:
    """By pip, which asks the index that the user has configured; only the wheel of exactly this hash."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"pip could not fetch {package.name} {package.version}: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise FetchError(f"pip could not fetch {package.name} {package.version}: {reason[:200]}")
    return wheels[0]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.real.fetch", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="folder of the packages' folders (out/real)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        for package in PACKAGES.values():
            print(f"{fetch(package, options.out)} ({package.version}, {package.licence})")
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
