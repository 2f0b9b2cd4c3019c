"""The command line: what it passes on, and what it says when something is wrong."""

import json
import os
import socket
import subprocess
import sys
import types

import pytest

from hip_sglang import bench, cli, doctor
from hip_sglang.doctor import Finding

MAIN = "from hip_sglang.cli import main; main()"


def one_line(capsys):
    """What was said on stderr, which is one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(autouse=True)
def no_server_in_this_process(monkeypatch):
    """A check that fails to refuse must not turn pytest into a server."""
    monkeypatch.setattr(cli.os, "execv", lambda *arguments: pytest.fail("a server was started"))


@pytest.fixture
def fake_sglang(tmp_path):
    """A stand-in for SGLang's launcher that reports what it was given and exits with 7."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(
        "import json, os, sys\nprint(json.dumps([os.getpid(), *sys.argv[1:]]))\nsys.exit(7)\n"
    )
    return tmp_path


def serve(folder, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    return process, json.loads(output)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_serve_becomes_sglangs_launcher(fake_sglang):
    arguments = ["--model-path", "m", "--port", str(free_port()), "--hip-preset", "quality"]
    process, (pid, *received) = serve(fake_sglang, *arguments)
    assert received == ["--attention-backend", "hip_attention", *arguments]
    # the same process, so that signals reach the server and its exit code is ours
    assert pid == process.pid
    assert process.returncode == 7


def test_serve_passes_help_on(fake_sglang):
    _, (_, *received) = serve(fake_sglang, "--help")
    assert received == ["--attention-backend", "hip_attention", "--help"]


@pytest.mark.parametrize(
    "given",
    [
        ["--attention-backend", "torch_native"],
        ["--attention-backend=torch_native"],
        ["--prefill-attention-backend", "triton", "--decode-attention-backend", "triton"],
    ],
    ids=["separate", "joined", "per phase"],
)
def test_serve_keeps_the_backend_that_was_chosen(given):
    assert cli.server_arguments(given) == given


@pytest.mark.parametrize("spelling", ["--port {}", "--port={}", "--port 1 --port {}"])
def test_a_port_in_use_is_one_line(spelling, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(["serve", *spelling.format(port).split()]) == 2
    message = f"port {port} on 127.0.0.1 is in use"
    assert message in one_line(capsys)


def test_a_port_that_is_none_is_one_line(capsys):
    assert cli.run(["serve", "--port", "http"]) == 2
    assert "--port http is not a port" in one_line(capsys)


def test_help_needs_neither_torch_nor_sglang():
    heavy = "print(sorted({'torch', 'sglang', 'transformers', 'matplotlib'} & set(sys.modules)))"
    code = f"import sys; from hip_sglang.cli import run; assert run(['--help']) == 0; {heavy}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.endswith("\n[]\n")
    for command in ("serve", "demo", "bench", "config", "doctor"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "fly"),
        (["config"], "Missing command"),
        (["config", "show", "--hip-preset", "x"], "preset='x'"),
        (["config", "show", "--hip-config", '{"bugdet": 4096}'], "bugdet"),
        (["config", "show", "--hip-config", "no-such-file.json"], "no-such-file.json"),
        (["config", "show", "--hip-config", '{"budget": '], "not valid JSON"),
        (["config", "show", "--hip-config", '{"budget": 1}'], "budget"),
        (["demo", "--doc", "no-such-file.txt"], "no such file"),
        (["demo", "--context", "1"], "--context"),
        (["demo", "model", "somewhere", "--dtype", "int3"], "int3"),
        (["bench", "no-such-bench"], "no-such-bench"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(argv) == 2
    error = one_line(capsys)
    assert error.startswith("hip-sglang: ")
    assert message in error


def test_a_page_of_no_size_that_there_is_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("HIP_SGLANG_PAGE_SIZE", "20")
    assert cli.run(["config", "show"]) == 2
    assert "a page has 16, 32 or 64 tokens" in one_line(capsys)


def test_config_show_prints_the_resolved_configuration(capsys):
    assert cli.run(["config", "show", "--hip-config", '{"budget": 4096}', "--layers", "3"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["budget"] == 4096
    rows = [line.split() for line in shown.err.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdecimal()] == ["0", "1", "2"]
    # the budget, in pages
    assert all("64" in row for row in rows if row and row[0].isdecimal())


@pytest.fixture
def recorded_demo(monkeypatch):
    calls = []

    def run_demo(*arguments, **options):
        calls.append((arguments, options))
        return 1

    module = types.ModuleType("hip_sglang.demo.run")
    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "hip_sglang.demo.run", module)
    return calls


def test_demo_runs_and_its_verdict_is_the_exit_code(recorded_demo, tmp_path):
    document = tmp_path / "book.txt"
    document.write_text("text")
    argv = ["demo", "--doc", str(document), "--out", str(tmp_path), "--context", "8192"]
    assert cli.run(argv) == 1
    assert cli.run([*argv, "--offload"]) == 1
    given = (document, tmp_path, 8192)
    assert recorded_demo == [(given, {"offload": False}), (given, {"offload": True})]


def test_demo_model_does_not_run_the_demo(recorded_demo, monkeypatch, tmp_path, capsys):
    written = []
    module = types.ModuleType("hip_sglang.demo.model")
    module.write_model = lambda directory, **options: written.append((directory, options))
    monkeypatch.setitem(sys.modules, "hip_sglang.demo.model", module)
    assert cli.run(["demo", "model", str(tmp_path), "--dtype", "bfloat16", "--seed", "3"]) == 0
    assert written == [(tmp_path, {"dtype": "bfloat16", "seed": 3})]
    assert recorded_demo == []


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    (tmp_path / "shared.py").write_text("CODE = 5\n")
    (tmp_path / "probe.py").write_text(
        "from .shared import CODE\n\n\ndef main(argv):\n    print(argv)\n    return CODE\n"
    )
    monkeypatch.setattr(bench, "folder", lambda: tmp_path)
    before = set(sys.modules)
    monkeypatch.delitem(sys.modules, bench.PACKAGE, raising=False)
    yield
    for name in set(sys.modules) - before | {bench.PACKAGE}:
        sys.modules.pop(name, None)


def test_bench_passes_its_arguments_on(benchmarks, capsys):
    assert bench.bench_names() == ["probe"]
    assert cli.run(["bench", "probe", "--help", "--json", "x"]) == 5
    assert capsys.readouterr().out == "['--help', '--json', 'x']\n"


def test_a_healthy_machine_can_serve(capsys):
    findings = [Finding("torch", "ok", "1"), Finding("ray", "optional", "none", "install it")]
    assert doctor.print_table(findings)
    assert "can run here" in capsys.readouterr().out


def test_doctor_exits_1_when_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_sglang))
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert cli.run(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["can_serve"] is False
    states = {finding["what"]: finding["state"] for finding in report["findings"]}
    assert states == {"Python": "ok", "SGLang": "missing"}


@pytest.mark.parametrize("found", ["0.5.20", "0.5.22", None])
def test_only_one_sglang_is_supported(found, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: found)
    finding = doctor.check_sglang()
    assert finding.state == "missing"
    assert doctor.SUPPORTED_SGLANG in finding.hint


def test_the_doctor_and_the_server_agree_on_the_supported_sglang():
    from hip_sglang.runtime import requirements

    assert doctor.SUPPORTED_SGLANG == requirements.SUPPORTED_SGLANG


def test_a_check_that_fails_is_a_finding():
    def check_something_odd():
        raise ImportError("libodd.so:\n cannot open")

    finding = doctor._guarded(check_something_odd)
    assert (finding.what, finding.state) == ("something odd", "missing")
    assert finding.found == "ImportError: libodd.so: cannot open"


def test_every_finding_that_is_not_ok_says_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(doctor, "cgroup_memory_limit", lambda: 2**30)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(total=2**26)
    )
    bad = {finding.what for finding in doctor.examine() if finding.state != "ok"}
    everything = {"torch", "SGLang", "plugin", "triton", "memory", "cores", "shared memory"}
    assert everything | {"ray", "helm"} <= bad
    assert all(finding.hint for finding in doctor.examine() if finding.state != "ok")


def test_the_whitelist_of_sglang_may_leave_us_out(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    finding = doctor.check_plugin()
    assert finding.state == "missing"
    assert "SGLANG_PLUGINS" in finding.hint


def test_the_cgroup_limit_is_read(tmp_path):
    assert doctor.cgroup_memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.cgroup_memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("4294967296\n")
    assert doctor.cgroup_memory_limit(tmp_path) == 2**32
