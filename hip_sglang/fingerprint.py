"""What tells a model from another one, or from what it was before."""

from __future__ import annotations

import hashlib
from pathlib import Path

DESCRIBED = ("config.json", "tokenizer.json")
WEIGHTS = ("*.safetensors", "*.bin")
# bytes of each weight file, from as many places: whole files take minutes
SAMPLE, PLACES = 1 << 16, 16


def fingerprint(directory: Path) -> str:
    """Of a model's configuration, its tokenizer, and samples of its weights."""
    digest = hashlib.sha256()
    for name in DESCRIBED:
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes())
    for path in sorted(path for pattern in WEIGHTS for path in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(PLACES):
                file.seek(max(0, size - SAMPLE) * place // (PLACES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
