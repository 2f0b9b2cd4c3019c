"""How many tokens fit where: by hand, and as the pool is really built."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hip_kernels.layout import PAGE_SIZE

from hip_sglang.cli import run
from hip_sglang.config import Disk, HipConfig
from hip_sglang.config_text import ConfigError
from hip_sglang.kv.memory import GIB, KVShape, MemoryPlan
from hip_sglang.kv.pool import OffloadedKVPool
from hip_sglang.kv.summary_pool import SummaryPool
from hip_sglang.runtime import settings
from hip_sglang.runtime.requirements import UnsupportedError

LLAMA_8B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def plan_of(offload: dict[str, Any], **given: Any) -> MemoryPlan:
    config = HipConfig.load({"offload": offload})
    known = {"context": 131072, "running": 16, "device_bytes": None}
    host = int(config.offload.host_gib * GIB)
    shape = KVShape.of(LLAMA_8B, itemsize=2)
    return MemoryPlan.of(shape, config, **{"host_bytes": host, **known, **given})


def test_the_sizes_of_a_known_model() -> None:
    found = plan_of({"host_gib": 64}, device_bytes=60 * GIB)
    # 128 KiB a token, and a page of padding
    assert found.logical_tokens == 64 * GIB // (128 << 10) - PAGE_SIZE == 524_224
    assert found.host_bytes == 64 * GIB
    # six rows of 64 keys and 64 values
    assert found.summary_bytes == pytest.approx(64 * GIB * 6 / 128, rel=1e-3)
    # what is left of the device is its cache, of which a request needs 8,192 tokens
    taken = found.cache_bytes + found.summary_bytes + found.table_bytes
    assert taken <= 60 * GIB < taken + 2 * 64 * (128 << 10)
    assert found.running == 16
    # whoever reads nodes stores them: three rows for eight pages of six
    long = plan_of({"host_gib": 64}, device_bytes=60 * GIB, context=1 << 20)
    assert long.summary_bytes == pytest.approx(found.summary_bytes * 17 / 16, rel=2e-3)


def test_a_device_for_few_tokens_serves_few_requests() -> None:
    assert plan_of({"host_gib": 8, "device_tokens": 8192}).running == 1
    assert plan_of({"host_gib": 8, "device_tokens": 40_000}).running == 4
    # without a word, and without a device of its own, what the requests need
    assert plan_of({"host_gib": 32}).device_tokens == 16 * 8192


@pytest.mark.parametrize(
    ("offload", "given", "said"),
    [
        ({"host_gib": 0.01}, {}, "offload.host_gib=0.01 leaves this rank"),
        ({"host_gib": 64}, {"device_bytes": 3 * GIB}, "are needed: summaries and tables 3.01 GiB"),
        (
            {"host_gib": 64, "device_tokens": 65536},
            {"device_bytes": 8 * GIB},
            "lower offload.host_gib or offload.device_tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    offload: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(offload, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_plan_is_what_the_pool_takes(dtype: torch.dtype) -> None:
    config = HipConfig.load({"offload": {"host_gib": 1 / 256, "device_tokens": 8192}})
    shape = KVShape(layers=2, kv_heads=2, head_dim=16, value_dim=16, itemsize=dtype.itemsize)
    planned = MemoryPlan.of(
        shape, config, host_bytes=GIB // 256, context=4096, running=1, device_bytes=None
    )
    pool = OffloadedKVPool(
        planned.logical_tokens, dtype=dtype, head_num=2, head_dim=16, v_head_dim=16, layer_num=2,
        start_layer=0, end_layer=1, device="cpu", device_tokens=planned.device_tokens,
        miss_policy="fetch",
    )  # fmt: skip
    assert sum(pool.get_kv_size_bytes()) == planned.host_bytes
    layers = {layer: config.layer_plan(layer) for layer in range(2)}
    assert SummaryPool(pool, layers, 0).nbytes == planned.summary_bytes
    taken = sum(cache.nbytes for cache in pool.caches)
    assert taken == pytest.approx(planned.cache_bytes + planned.table_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("hip", "said"),
    [
        ({"offload": {"host_gib": 1e6}}, "offload.host_gib=1e.06 is more than the .* GiB of host"),
        (
            {"offload": {"host_gib": 0.1, "device_tokens": 4096}},
            "offload.device_tokens=4096 is too small: one query reads up to 8,192 tokens exactly",
        ),
    ],
)
def test_the_server_refuses_before_it_starts(hip: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        settings._check_offload(HipConfig.load(hip), SimpleNamespace(device="cpu"))


@pytest.mark.parametrize(
    ("gib", "asked", "said"),
    [
        (
            1e6,
            {},
            r"offload.disk.gib=1e\+06 is more than the [\d.]+ GiB that .* has free; lower it",
        ),
        (1, {"disable_radix_cache": True}, "cannot with --disable-radix-cache"),
        (1, {"radix_cache_backend": "other"}, "cannot with --radix-cache-backend"),
        (1, {"pp_size": 2}, "cannot with --pp-size"),
    ],
)
def test_a_disk_that_cannot_be_as_asked_is_refused(
    tmp_path: Path, gib: float, asked: dict[str, Any], said: str
) -> None:
    plain = {"disable_radix_cache": False, "radix_cache_backend": None, "pp_size": 1}
    disk = Disk(path=tmp_path / "not" / "there", gib=gib)
    with pytest.raises(UnsupportedError, match=said):
        settings._check_disk(disk, SimpleNamespace(**{**plain, **asked}))
    settings._check_disk(Disk(path=disk.path, gib=0.001), SimpleNamespace(**plain))


def test_a_disk_that_shows_nothing_is_left_to_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    # root may do everything
    monkeypatch.setattr(Path, "exists", refuse)
    assert settings._room_on_disk(tmp_path / "closed") is None


def test_plan_answers_without_starting_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert run(["plan", "--model", str(tmp_path), "--host-gib", "256", "--gpu-gib", "80"]) == 0
    assert "2,097,088" in capsys.readouterr().out
    given = ["plan", "--model", str(tmp_path), "--host-gib", "256", "--tp", "4", "--json"]
    assert run(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logical_tokens"] == 2_097_088
    assert found["host_bytes"] == 64 * GIB, "of one rank"
    for wrong, said in (
        (["--model", str(tmp_path / "x"), "--host-gib", "1"], "no config.json to read there"),
        (["--model", str(tmp_path), "--host-gib", "9", "--tp", "3"], "3 ranks cannot share 8"),
        (["--model", str(tmp_path), "--host-gib", "9", "--kv-dtype", "int4"], "--kv-dtype int4"),
    ):
        assert run(["plan", *wrong]) == 2
        assert said in capsys.readouterr().err
