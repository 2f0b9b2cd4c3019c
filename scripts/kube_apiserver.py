"""Builds a real kube-apiserver, and fetches etcd, for the chart's tests: `make helm-e2e`.

No package registry has the program; Debian 12 has its source, the compiler and etcd. It is
Kubernetes 1.20, which calls itself the newest version that the chart is tested for, so that helm
installs there. Both programs are kept outside the checkout; a second run finds them there.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helm_tools import KUBERNETES

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hip-sglang"
# counts up when what is built changes
FOLDER = CACHE / "kube-apiserver-1.20.2-1"
API_SERVER, ETCD = FOLDER / "kube-apiserver", FOLDER / "etcd"

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHIVES = {
    "http://deb.debian.org/debian": "bookworm",
    "http://deb.debian.org/debian-security": "bookworm-security",
}
# its vendored reflect2 crashes on custom resources with a compiler newer than Go 1.17
REFLECT = "github.com/modern-go/reflect2"
PACKAGES = [
    "golang-1.19-go",
    "golang-1.19-src",
    "etcd-server",
    "golang-github-modern-go-reflect2-dev",
]
NEEDED = ("apt-get", "dpkg-deb", "tar", "xz")
OPENAPI = "pkg/generated/openapi"
ASKS = re.compile(rb"^// ?\+k8s:openapi-gen=true", re.MULTILINE)


def there() -> bool:
    """Whether both programs are in the cache."""
    return API_SERVER.is_file() and ETCD.is_file()


@dataclass(frozen=True)
class Workshop:
    """Where it is built; what a run that was interrupted left is used by the next."""

    root: Path

    @property
    def sources(self) -> Path:
        return self.root / "go" / "src" / "k8s.io" / "kubernetes"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "GOROOT": str(self.root / "debian/usr/lib/go-1.19"),
            "GOPATH": str(self.root / "go"),
            "GOCACHE": str(self.root / "cache"),
            "GO111MODULE": "off",
            "GOFLAGS": "",
            "GOPROXY": "off",
            "CGO_ENABLED": "0",
        }

    def run(self, what: str, command: Sequence[str | Path], folder: Path | None = None) -> None:
        """One step; raises SystemExit with one line that says which, and where its log is."""
        began, log = time.monotonic(), self.root / "log.txt"
        print(f"helm-e2e: {what} ...", flush=True)
        with log.open("ab") as output:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=folder or self.root,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            reason = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SystemExit(f"helm-e2e: {what} failed: {' '.join(reason)[:300]} (log: {log})")
        print(f"helm-e2e: {what} took {time.monotonic() - began:.0f} s", flush=True)


def build() -> None:
    """Bring what is missing; raises SystemExit with one line where that is not possible here."""
    if there():
        return
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or not KEYRING.is_file():
        raise SystemExit(
            f"helm-e2e: kube-apiserver is built from Debian's source, and this machine has no "
            f"{', '.join(missing) or KEYRING}; run it on Debian, where apt's archives are reachable"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    shop = Workshop(FOLDER / "build")
    shop.root.mkdir(exist_ok=True)
    # minutes of compiling, which nobody waits for
    os.nice(19)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if there():
            return
        fetch(shop)
        unpack(shop)
        compile_programs(shop)
        _keep(shop.root / "debian/usr/bin/etcd", ETCD)
        _keep(shop.root / "kube-apiserver", API_SERVER)
        shutil.rmtree(shop.root)


def fetch(shop: Workshop) -> None:
    """Packages and the source, by an apt that knows nothing of this machine's own."""
    apt = _apt(shop)
    downloads = shop.root / "downloads"
    if downloads.is_dir():
        return
    arriving = shop.root / "downloads.new"
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir()
    shop.run("reading Debian's archives", [*apt, "update"])
    shop.run("fetching Go and etcd", [*apt, "download", *PACKAGES], arriving)
    shop.run("fetching the source", [*apt, "source", "--download-only", "kubernetes"], arriving)
    arriving.rename(downloads)


def _apt(shop: Workshop) -> list[str]:
    lines = [
        f"{kind} [signed-by={KEYRING}] {url} {suite} main\n"
        for url, suite in ARCHIVES.items()
        for kind in ("deb", "deb-src")
    ]
    (shop.root / "sources.list").write_text("".join(lines))
    for folder in ("apt/lists/partial", "apt/archives/partial"):
        (shop.root / folder).mkdir(parents=True, exist_ok=True)
    options: Mapping[str, Path | str] = {
        "Dir::Etc::sourcelist": shop.root / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": shop.root / "apt/lists",
        "Dir::Cache": shop.root / "apt",
        # a user's folder is not open to apt's own
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        # without a network say so, and do not take old lists for new ones
        "APT::Update::Error-Mode": "any",
    }
    return ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]


def unpack(shop: Workshop) -> None:
    """Compiler and source, where Go looks for them. Debian's patches are kubectl's, not needed."""
    if shop.sources.is_dir():
        return
    downloads = shop.root / "downloads"
    for package in sorted(downloads.glob("*.deb")):
        shop.run(f"unpacking {package.name}", ["dpkg-deb", "-x", package, shop.root / "debian"])
    arriving = shop.sources.with_suffix(".new")
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True)
    (archive,) = downloads.glob("kubernetes_*.orig.tar.gz")
    shop.run("unpacking the source", ["tar", "-xzf", archive, "--strip-components=1"], arriving)
    newer = shop.root / "debian/usr/share/gocode/src" / REFLECT
    shutil.rmtree(arriving / "vendor" / REFLECT)
    shutil.copytree(newer, arriving / "vendor" / REFLECT)
    arriving.rename(shop.sources)


def compile_programs(shop: Workshop) -> None:
    """The schema of all APIs, which is not in the tarball, and then the server."""
    go = shop.root / "debian/usr/lib/go-1.19/bin/go"
    generator, server = shop.root / "openapi-gen", shop.root / "kube-apiserver"
    package = "./vendor/k8s.io/kube-openapi/cmd/openapi-gen"
    shop.run("compiling openapi-gen", [go, "build", "-o", generator, package], shop.sources)
    generate = [generator, "--logtostderr", "-i", ",".join(_described(shop.sources))]
    generate += ["-p", f"k8s.io/kubernetes/{OPENAPI}", "-O", "zz_generated.openapi"]
    generate += ["-h", shop.sources / "hack/boilerplate/boilerplate.generatego.txt"]
    generate += ["-r", shop.root / "violations.txt"]
    shop.run("describing the APIs", generate, shop.sources)
    minor = KUBERNETES[-1].partition(".")[2]
    told = {"gitVersion": f"v1.{minor}.0", "gitMajor": "1", "gitMinor": minor}
    flags = [
        f"-X k8s.io/kubernetes/vendor/{package}.{name}={value}"
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        for name, value in told.items()
    ]
    command = [go, "build", "-trimpath", "-ldflags", " ".join(["-s", "-w", *flags])]
    shop.run(
        "compiling kube-apiserver", [*command, "-o", server, "./cmd/kube-apiserver"], shop.sources
    )


def _described(sources: Path) -> list[str]:
    """The packages that ask to be in the schema, as Go imports them."""
    found = set()
    for root in ("pkg", "staging/src/k8s.io"):
        for file in (sources / root).rglob("*.go"):
            if "_examples" in file.parts or "sample-apiserver" in file.parts:
                continue
            if ASKS.search(file.read_bytes()):
                folder = str(file.parent.relative_to(sources))
                found.add(f"k8s.io/kubernetes/{folder.replace('staging/src/', 'vendor/')}")
    return sorted(found)


def _keep(program: Path, path: Path) -> None:
    # an interrupted run leaves no half a file under the name that the next one looks for
    partial = path.with_name(f"{path.name}.new")
    shutil.copyfile(program, partial)
    partial.chmod(0o755)
    partial.replace(path)


if __name__ == "__main__":
    build()
