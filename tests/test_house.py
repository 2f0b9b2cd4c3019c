"""The rules of the house that a machine can hold."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hip_sglang.bench import load_bench

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "hip_kernels": ROOT / "kernels" / "hip_kernels",
    "hip_sglang": ROOT / "hip_sglang",
    "hip_cluster": ROOT / "cluster" / "hip_cluster",
}
# who may import whom: hip_cluster -> hip_sglang -> hip_kernels
FORBIDDEN = {
    "hip_kernels": {"hip_sglang", "hip_cluster", "sglang"},
    "hip_sglang": {"hip_cluster"},
    "hip_cluster": set(),
}
TOUCHES_SGLANG = re.compile(r"hip_sglang/(attention|kv|runtime)/.*|cluster/hip_cluster/engine\.py")


def project_files(suffix: str = "") -> list[Path]:
    """The files of the checkout that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in listing.stdout.split("\0") if name.endswith(suffix))
    return [path for path in paths if path.is_file()]


def imports(source: str) -> Iterator[str]:
    """The absolute modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # "from sglang import srt" imports sglang.srt
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imports(path.read_text(encoding="utf-8")))


def test_imports_are_found_wherever_they_stand():
    source = "def f():\n    from sglang import srt\nimport a.b, c\nfrom . import d"
    assert set(imports(source)) == {"sglang.srt", "a.b", "c"}


@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows_run_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in PACKAGES[package].rglob("*.py")
        for module in imports_of(path)
        if module.split(".")[0] in FORBIDDEN[package] | {"benchmarks", "tests"}
    ]
    assert wrong == []


def test_sglang_internals_are_touched_in_few_places():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if not TOUCHES_SGLANG.fullmatch(path.relative_to(ROOT).as_posix())
        for module in imports_of(path)
        if module.startswith("sglang.srt")
    ]
    assert wrong == []


def test_benchmarks_import_each_other_relatively():
    """In the wheel they are hip_sglang._benchmarks."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "benchmarks").rglob("*.py")
        if any(module.split(".")[0] == "benchmarks" for module in imports_of(path))
    ]
    assert wrong == []


def test_no_file_is_longer_than_400_lines():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in project_files(".py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


def test_no_text_names_this_machine_or_a_package_registry():
    # spelled in halves, so that this file does not find itself
    machine = re.compile(
        "|".join(["/wor" + "k/", "py" + "pi[.]org", "python" + "hosted", "/o" + "pt/wheels"])
    )
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in machine.findall(text)]
        if len(ROOT.parts) > 2 and str(ROOT) in text:
            found.append(f"{path.relative_to(ROOT)}: {ROOT}")
    assert found == []


def test_the_numbers_shown_are_those_of_the_results():
    assert load_bench("numbers").stale() == {}, "run `make numbers`"


def test_no_kernel_uses_what_triton_removed():
    removed = re.compile(r"\btl\.(make_block_ptr|advance)\b")
    wrong = [
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if removed.search(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_three_packages_and_nothing_else_on_top(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_module(wheel_names):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    } | {
        f"hip_sglang/_benchmarks/{path.relative_to(ROOT / 'benchmarks').as_posix()}"
        for path in (ROOT / "benchmarks").rglob("*.py")
    }
    assert expected - wheel_names == set()
    assert not [name for name in wheel_names if "/results/" in name]


@pytest.fixture
def fresh_checkout(tmp_path):
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def set_up(checkout, path, **environment):
    """scripts/setup.sh, with ``path`` searched for programs first."""
    search = f"{path}:/usr/bin:/bin"
    return subprocess.run(
        [checkout / "scripts" / "setup.sh"],
        env={"PATH": search, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_setup_refuses_another_system_in_one_line(fresh_checkout):
    program(fresh_checkout / "bin", "uname", "echo Darwin arm64")
    result = set_up(fresh_checkout, fresh_checkout / "bin")
    assert result.returncode == 2
    assert result.stderr == "setup: runs on Linux x86-64 only, and this is Darwin arm64\n"
    assert not (fresh_checkout / ".venv").exists()


def test_setup_refuses_an_unsuitable_python_in_one_line(fresh_checkout):
    python = program(fresh_checkout / "bin", "python3.10", "exit 1")
    result = set_up(fresh_checkout, fresh_checkout / "bin", PYTHON=str(python))
    assert result.returncode == 2
    assert result.stderr.startswith(f"setup: PYTHON={python} is not a Python 3.11 or 3.12")
    assert result.stderr.count("\n") == 1


def test_setup_says_when_no_python_fits(fresh_checkout):
    for name in ("python3.12", "python3.11", "python3", "python"):
        program(fresh_checkout / "bin", name, "echo 'command not found' >&2; exit 127")
    result = set_up(fresh_checkout, fresh_checkout / "bin")
    assert result.returncode == 2
    assert "needs Python 3.11 or 3.12" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_setup_says_in_one_line_that_pip_failed_and_resumes(fresh_checkout):
    environment = {"PYTHON": sys.executable, "HOME": str(fresh_checkout)}
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    first = set_up(fresh_checkout, fresh_checkout, **environment, **nowhere)
    assert first.returncode == 1
    assert "[2/6] failed: No matching distribution found for torch" in first.stderr
    assert first.stderr.count("\n") == 1
    again = set_up(fresh_checkout, fresh_checkout, **environment, **nowhere)
    assert "[1/6]" not in again.stdout
