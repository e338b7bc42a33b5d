"""Where a model lies: a local folder, the embedded demo model, or an id of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from services.common.errors import InvalidCheckpoint

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"
# Data only: no pickles, no code.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "SHA256SUMS")


def resolve_model(path: str) -> Path:
    """The folder of a model. `demo` is the embedded one. Raises InvalidCheckpoint if there is none."""
    if path == "demo":
        return DEMO_MODEL
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InvalidCheckpoint(path, "no such folder")
    try:
        return Path(snapshot_download(path, allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidCheckpoint(path, f"neither a folder nor a model the hub gives: {type(error).__name__}") from error
