"""What tells whether data or a model is still the one that a run began with."""

import hashlib
import os
from pathlib import Path
from typing import Any

# What makes a folder a model; whatever else stands beside it (logs, checkpoints, a run's record) does not count.
MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*config.json", "tokenizer*", "chat_template*")
BLOCK = 1 << 20


def fingerprint(data: str | list[str]) -> str:
    """Return a hash of the content of local files and model folders, or of the name of something on the hub.

    Of a model folder, files above 64 MB count with their size, first and last block only: training changes every
    block, and hashing hundreds of gigabytes would take minutes.
    """
    digest = hashlib.sha256()
    for source in [data] if isinstance(data, str) else data:
        path = Path(source)
        if path.is_dir():
            for file in sorted({f for pattern in MODEL_FILES for f in path.glob(pattern) if f.is_file()}):
                digest.update(file.name.encode())
                _digest_file(digest, file, whole=file.stat().st_size <= 64 * BLOCK)
        elif path.is_file():
            _digest_file(digest, path, whole=True)
        else:
            digest.update(source.encode())
    return digest.hexdigest()[:16]


def _digest_file(digest: Any, path: Path, whole: bool) -> None:
    with open(path, "rb") as file:
        if whole:
            while block := file.read(BLOCK):
                digest.update(block)
            return
        digest.update(str(path.stat().st_size).encode())
        digest.update(file.read(BLOCK))
        file.seek(-BLOCK, os.SEEK_END)
        digest.update(file.read(BLOCK))
