"""Which code a result was measured with."""

import subprocess


def commit() -> str:
    """The short hash of HEAD; empty where the tree is no clone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
