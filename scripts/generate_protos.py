"""Generates services/pb from protos/, or checks that it is in sync.

    python scripts/generate_protos.py             write the stubs
    python scripts/generate_protos.py --check     lint, breaking changes, stubs in sync; exit 1 if not
    python scripts/generate_protos.py --baseline  take the contract as it is now as the baseline (at a release)

Needs the `dev` extra. The stubs carry the version of the protoc that made them and refuse an older protobuf or grpcio:
a newer grpcio-tools in constraints.txt means new floors in pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
BASELINE = PROTOS / "baseline.binpb"
STUBS = ROOT / "services" / "pb"
PACKAGE = "services.pb"
TOOLS = Path(sys.executable).parent

# What protoc writes for `import "antiphon/v1/types.proto"`; the stubs live under PACKAGE instead.
IMPORTS = (
    (re.compile(r"^from antiphon\.", re.MULTILINE), f"from {PACKAGE}.antiphon."),
    (re.compile(r"^import antiphon\.", re.MULTILINE), f"import {PACKAGE}.antiphon."),
    (re.compile(r"(?<![\w.'\"/])antiphon\.(?=[\w.]*_pb2\b)"), f"{PACKAGE}.antiphon."),
)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of order")
    mode.add_argument("--baseline", action="store_true", help="write the baseline of the breaking-change check")
    options = parser.parse_args()
    if options.baseline:
        return buf("build", str(PROTOS), "-o", str(BASELINE))
    if options.check:
        return check()
    write(generate())
    return 0


def check() -> int:
    """Lint, format, breaking changes and sync of the stubs; 0 if all is well."""
    status = buf("lint", str(PROTOS)) or buf("format", str(PROTOS), "--diff", "--exit-code")
    status = status or buf("breaking", str(PROTOS), "--against", str(BASELINE))
    if status:
        return status
    stale = differences(generate())
    for path in stale:
        print(f"out of sync: {path.relative_to(ROOT)}", file=sys.stderr)
    if stale:
        print("run: make protos", file=sys.stderr)
    return int(bool(stale))


def buf(*arguments: str) -> int:
    """Runs buf; returns its exit status."""
    return subprocess.run([str(TOOLS / "buf"), *arguments], check=False).returncode


def generate() -> dict[Path, str]:
    """Every file that belongs under services/pb, with its text."""
    with tempfile.TemporaryDirectory() as scratch:
        protoc(Path(scratch))
        made = {path.relative_to(scratch): path.read_text() for path in sorted(Path(scratch).rglob("*.py*"))}
    texts = {STUBS / path: rewrite_imports(text) for path, text in made.items()}
    packages = {parent for path in texts for parent in path.parents if parent == STUBS or STUBS in parent.parents}
    return texts | {package / "__init__.py": "" for package in packages}


def protoc(target: Path) -> None:
    """Runs protoc with the message, gRPC and type-stub generators into `target`."""
    sources = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.rglob("*.proto"))]
    command = [
        sys.executable,
        *("-m", "grpc_tools.protoc"),
        f"-I{PROTOS}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={TOOLS / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={TOOLS / 'protoc-gen-mypy_grpc'}",
        *(f"--{generator}_out={target}" for generator in ("python", "grpc_python")),
        *(f"--{generator}_out=quiet:{target}" for generator in ("mypy", "mypy_grpc")),
        *sources,
    ]
    subprocess.run(command, check=True)


def rewrite_imports(text: str) -> str:
    """Points imports of generated modules at services.pb."""
    for pattern, replacement in IMPORTS:
        text = pattern.sub(replacement, text)
    return text


def differences(wanted: dict[Path, str]) -> list[Path]:
    """Files under services/pb that are missing, differ, or should not be there."""
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    extra = [path for path in STUBS.rglob("*.py*") if "__pycache__" not in path.parts and path not in wanted]
    return sorted(stale + extra)


def write(wanted: dict[Path, str]) -> None:
    """Makes services/pb hold exactly `wanted`."""
    for path in differences(wanted):
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
