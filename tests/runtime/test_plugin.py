"""What a user sees: the resolved arguments, and one clear line where something is refused."""

import os
import re
import subprocess
import sys

import pytest

from hip_sglang.runtime import host_platform, plugin
from hip_sglang.runtime.requirements import UnsupportedError, check_version

on_cpu = pytest.mark.skipif(
    host_platform.has_accelerator(), reason="this machine has an accelerator"
)


@pytest.fixture
def parse(sglang, model, monkeypatch):
    """Command-line arguments as ``launch_server`` reads them."""
    # resolution may set it
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    from sglang.srt.server_args import prepare_server_args

    def parse(*args, backend="hip_attention"):
        argv = ["--model-path", str(model), "--attention-backend", backend, *args]
        return prepare_server_args(argv)

    yield parse
    os.environ.pop("SGLANG_CPU_OMP_THREADS_BIND", None)


@pytest.fixture
def resolve(parse):
    def resolve(*args, backend="hip_attention"):
        server_args = parse(*args, backend=backend)
        server_args.resolve_once()
        return server_args.resolved_dict()

    return resolve


def error_lines(stderr):
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("hip-sglang: error: ")]


@on_cpu
def test_a_bare_command_is_complete_on_a_cpu(resolve):
    resolved = resolve()
    assert resolved["device"] == "cpu"
    assert resolved["page_size"] == 64
    assert resolved["dtype"] == "float32"
    assert resolved["disable_overlap_schedule"] is True
    assert resolved["chunked_prefill_size"] == 4096
    assert resolved["max_running_requests"] == 16
    assert resolved["sampling_backend"] == "pytorch"
    graphs = resolved["cuda_graph_config"]
    assert {graphs[phase]["backend"] for phase in ("prefill", "decode")} == {"disabled"}


@on_cpu
def test_what_the_user_gives_stays(resolve):
    resolved = resolve(
        *("--chunked-prefill-size", "512", "--max-running-requests", "3", "--page-size", "64"),
        *("--dtype", "bfloat16", "--max-total-tokens", "8192"),
    )
    assert resolved["chunked_prefill_size"] == 512
    assert resolved["max_running_requests"] == 3
    assert resolved["dtype"] == "bfloat16"
    assert resolved["max_total_tokens"] == 8192


@on_cpu
def test_capacity_follows_free_memory(resolve, monkeypatch):
    from hip_sglang.runtime import settings

    # 4 layers, 2 KV heads, 64 + 64 channels, float32
    token = 4 * 2 * 128 * 4
    weights = settings._checkpoint_bytes(resolve()["model_path"])
    monkeypatch.setattr(settings, "_free_memory", lambda: weights + 3 * token * 10_000)
    assert resolve()["max_total_tokens"] == 10_000 // 64 * 64
    monkeypatch.setattr(settings, "_free_memory", lambda: 1 << 50)
    assert resolve()["max_total_tokens"] == 4 * 32768


@on_cpu
def test_too_little_memory_is_refused(parse, monkeypatch, capsys):
    from hip_sglang.runtime import settings

    monkeypatch.setattr(settings, "_free_memory", lambda: 1 << 20)
    with pytest.raises(SystemExit) as left:
        parse().resolve_once()
    assert left.value.code == 2
    assert "free memory has room for 0 tokens" in capsys.readouterr().err


@on_cpu
def test_a_context_shorter_than_a_prefill_chunk_is_served(resolve):
    assert resolve("--context-length", "512")["max_total_tokens"] == 4 * 512


@on_cpu
def test_ranks_share_the_processors(resolve, monkeypatch):
    monkeypatch.setattr(host_platform, "processors", lambda: [0, 2, 4, 6, 8])
    resolve("--tp-size", "2")
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,2|4,6"


@on_cpu
def test_ranks_take_turns_where_processors_are_few(resolve, monkeypatch):
    monkeypatch.setattr(host_platform, "processors", lambda: [3])
    resolve("--tp-size", "2")
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "3|3"


@on_cpu
def test_another_backend_on_our_platform_keeps_its_own_ways(resolve):
    resolved = resolve(backend="torch_native")
    assert resolved["attention_backend"] == "torch_native"
    assert resolved["page_size"] == 1
    assert resolved["max_total_tokens"] == 4 * 32768


def test_request_rows_stay_below_a_gibibyte(parse):
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    from hip_sglang.runtime import settings

    server_args = parse("--device", "cuda")
    model_config_of(server_args).context_len = 4 << 20
    assert settings._running_requests(resolving_view(server_args)) == 64
    model_config_of(server_args).context_len = 8192
    assert settings._running_requests(resolving_view(server_args)) == 256


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--speculative-algorithm", "NGRAM"], "speculative decoding"),
        (["--enable-hierarchical-cache"], "HiCache"),
        (["--enable-lmcache"], "another KV cache store"),
        (["--disaggregation-mode", "prefill"], "PD disaggregation"),
        (["--dcp-size", "2"], "context parallelism"),
        (["--attn-cp-size", "2"], "context parallelism"),
        (["--enable-hisparse"], "HiSparse"),
        (["--dllm-algorithm", "LowConfidence"], "diffusion language models"),
        (["--kv-cache-dtype", "nvfp4"], "--kv-cache-dtype nvfp4; use auto"),
        (["--page-size", "16"], "not --page-size 16; leave --page-size out, and give"),
        (["--chunked-prefill-size", "100"], "use a multiple of 64"),
        (["--decode-attention-backend", "triton"], "prefill=hip_attention with decode=triton"),
        (["--prefill-attention-backend", "torch_native"], "must serve both phases"),
        (["--tp-size", "4"], "--tp-size 4 is more than the 2 KV heads"),
        (["--enable-two-batch-overlap"], "several attention backends side by side"),
        (["--enable-pdmux"], "several attention backends side by side"),
        (["--hip-config", '{"dense_layers": [0, 99]}'], "dense_layers names layer 99, but this"),
        (["--hip-config", '{"per_layer": [{"layers": [9]}]}'], "per_layer names layer 9, but this"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_refusal_is_one_line_and_exit_code_2(parse, capsys, args, reason):
    server_args = parse(*args)
    with pytest.raises(SystemExit) as left:
        server_args.resolve_once()
    assert left.value.code == 2
    lines = error_lines(capsys.readouterr().err)
    assert len(lines) == 1
    assert reason in lines[0]


def test_graphs_of_metadata_are_refused(parse, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    with pytest.raises(SystemExit):
        parse().resolve_once()
    assert "finds nodes on the host; unset that variable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "decode"),
    [("{}", "full"), ('{"preset": "paper"}', "disabled"), ('{"trace": "t.jsonl"}', "disabled")],
)
def test_decode_graphs_are_for_what_kernels_do(parse, tmp_path, monkeypatch, config, decode):
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig

    from hip_sglang.runtime import settings

    monkeypatch.chdir(tmp_path)
    server_args = parse("--device", "cuda", "--hip-config", config)
    # what SGLang's own steps have decided by then
    declare_resolution(
        server_args, "test", cuda_graph_config=CudaGraphConfig(), mem_fraction_static=0.9
    )
    settings.settle_backend(server_args)
    assert resolving_view(server_args).cuda_graph_config.decode.backend == decode


def test_a_graph_of_whole_prompts_is_refused(parse):
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig

    from hip_sglang.runtime import settings

    server_args = parse("--device", "cuda")
    graphs = CudaGraphConfig(prefill=PhaseConfig(backend="full"))
    declare_resolution(server_args, "test", cuda_graph_config=graphs, mem_fraction_static=0.9)
    with pytest.raises(UnsupportedError, match="leave it out, or use breakable"):
        settings.settle_backend(server_args)


def test_our_flags_without_our_backend_are_refused(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--hip-preset", "dense", backend="torch_native").resolve_once()
    assert "need --attention-backend hip_attention" in capsys.readouterr().err


def test_a_bad_configuration_ends_the_command_line_at_once(parse, capsys):
    with pytest.raises(SystemExit) as left:
        parse("--hip-config", '{"budget": 3}')
    assert left.value.code == 2
    assert len(error_lines(capsys.readouterr().err)) == 1


def test_engine_gets_the_exception(sglang, model):
    from sglang.srt.entrypoints.engine import Engine

    build = Engine.server_args_class
    with pytest.raises(ValueError, match="unknown key 'x'"):
        build(model_path=str(model), hip_config={"x": 1})
    server_args = build(model_path=str(model), attention_backend="hip_attention", page_size=1)
    # what Engine notes about itself
    server_args._launch_command = "Engine(...)"
    with pytest.raises(UnsupportedError, match="--page-size 1"):
        server_args.resolve_once()


def test_only_one_release_is_supported():
    check_version("0.5.21")
    check_version("0.5.21+cpu")
    for version in ("0.5.20", "0.5.22", "0.5.21.post1", "0.5.210"):
        with pytest.raises(UnsupportedError, match=re.escape(f"{version} is installed")):
            check_version(version)


def run_python(program, *argv):
    return subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_another_release_of_sglang_ends_the_command_line(model):
    run = run_python(
        "import runpy, sglang.version; sglang.version.__version__ = '0.5.99';"
        "runpy.run_module('sglang.launch_server', run_name='__main__')",
        *("--model-path", str(model), "--attention-backend", "hip_attention"),
        *("--hip-preset", "dense"),
    )
    assert run.returncode == 2
    (line,) = error_lines(run.stderr)
    assert "sglang 0.5.99 is installed, but hip_attention supports 0.5.21 only" in line


def test_another_release_of_sglang_is_an_exception_for_engine(sglang, model, monkeypatch):
    import sglang.version
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(sglang.version, "__version__", "0.5.99")
    monkeypatch.setattr(plugin, "_problems", [])
    monkeypatch.setattr(plugin, "_register_guard", lambda: None)
    plugin.load()
    with pytest.raises(UnsupportedError, match=r"supports 0\.5\.21 only"):
        ServerArgs(model_path=str(model), attention_backend="hip_attention").resolve_once()
    ServerArgs(model_path=str(model), attention_backend="torch_native").resolve_once()


@pytest.mark.slow
def test_a_corrupt_file_is_one_line_from_sglang_serve(model, tmp_path):
    config = tmp_path / "hip.json"
    config.write_text('{"budget": 64,')
    run = run_python(
        "from sglang.cli.main import main; main()",
        *("serve", str(model), "--attention-backend", "hip_attention"),
        *("--hip-config", str(config)),
    )
    assert run.returncode == 2
    (line,) = error_lines(run.stderr)
    assert f"--hip-config {config}: not valid JSON at line 1, column 15" in line


def test_the_factory_checks_in_its_own_process(monkeypatch):
    pytest.importorskip("hip_sglang.attention.backend")
    monkeypatch.setattr(plugin, "_problems", ["no hooks here"])
    with pytest.raises(UnsupportedError, match="no hooks here"):
        plugin.build_backend(runner=None)
