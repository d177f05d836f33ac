"""Fetches the art and the names from their packages, checks them, unpacks what the recipe reads."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("pretrain_tiny")


@dataclass(frozen=True)
class Package:
    """One npm package: name, version, sha256 of its archive, the folder it is unpacked to."""

    name: str
    version: str
    sha256: str
    folder: str


PACKAGES = (
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "fluent-emoji-3d",
    ),
    Package(
        "asturur-noto-emoji",
        "3.0.3",
        "9ad2feb5088312931514f122d618e633d1b9e4a5a5cf11c702f28ed9996539d2",
        "noto-emoji",
    ),
    Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "emojibase-data",
    ),
)


def _fetch(package: Package, raw: Path) -> Path:
    command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
    result = subprocess.run(command, cwd=raw, check=True, capture_output=True, text=True)
    return raw / result.stdout.strip().splitlines()[-1]


def _unpack(archive: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    with tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
    (temporary / "package").rename(target)
    temporary.rmdir()


_CLIP_ART_FOLDER = "usr/share/openclipart/png"


def _clip_art(raw: Path) -> None:
    """Debian's openclipart-png, for the art style that is held back: needs apt-get and dpkg-deb."""
    target = raw / "openclipart"
    if target.exists():
        return
    subprocess.run(["apt-get", "download", "openclipart-png"], cwd=raw, check=True)
    archive = next(raw.glob("openclipart-png_*.deb"))
    whole = raw / "openclipart.tmp"
    subprocess.run(["dpkg-deb", "-x", str(archive), str(whole)], check=True)
    (whole / _CLIP_ART_FOLDER).rename(target)


def download(raw: Path) -> None:
    """Bring all packages to `raw/<folder>`; a package that is there already is kept."""
    raw.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = raw / package.folder
        if target.exists():
            continue
        archive = _fetch(package, raw)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(f"{archive.name} has sha256 {digest}, expected {package.sha256}")
        _unpack(archive, target)
        log.info("unpacked %s %s", package.name, package.version)
    _clip_art(raw)
