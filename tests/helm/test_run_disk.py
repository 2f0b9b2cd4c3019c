"""A rendered engine with a volume for prefixes runs, and its container starts again."""

import signal

import pytest

from tests.helm import chart
from tests.helm.pod import wait_until_started
from tests.helm.test_run import INIT_SECONDS, generate, machine_of, needs_cpu

SHAPE = {"layers": 2, "attentionHeads": 8, "kvHeads": 2, "headDim": 128}
OFFLOAD = {"enabled": True, "hostGiB": 1, "deviceTokens": 8192, "disk": {"gib": 1}}


@pytest.mark.soak
@pytest.mark.server
@pytest.mark.timeout(900)
@needs_cpu
def test_a_container_that_starts_again_finds_its_prefixes(tmp_path):
    more = {"model": {"shape": SHAPE}, "engine": {"offload": OFFLOAD}}
    values = chart.merged(chart.ci_values("cpu"), more)
    engine = chart.render(values).one("Deployment", "engine")["spec"]["template"]["spec"]
    assert {"name": "kv", "mountPath": "/kv"} in engine["containers"][0]["volumeMounts"]
    machine, container = machine_of(engine, tmp_path), engine["containers"][0]
    for first in engine["initContainers"]:
        assert machine.run(first, INIT_SECONDS).returncode == 0
    cached = []
    for start in range(2):
        with machine.start(container, tmp_path / f"engine-{start}.log") as process:
            wait_until_started(container, process)
            answer = generate(container, 4, prompt=6400)
            assert answer.status_code == 200
            cached.append(answer.json()["meta_info"]["cached_tokens"])
            # as the kubelet ends it: what was read is written first
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    assert cached == [0, 6400 - 64]
    assert list((tmp_path / "kv").rglob("*.bin"))
