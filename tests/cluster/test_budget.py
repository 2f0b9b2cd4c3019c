"""The memory arithmetic, held to the table that the chart's tests read, too."""

from pathlib import Path

import pytest
import yaml
from hip_cluster.budget import host_memory
from hip_cluster.spec import EndpointSpec, SpecError

CASES = yaml.safe_load((Path(__file__).parent / "memory_cases.yaml").read_text())


def spec_of(case):
    return {"name": "case", "model": {"path": "/models/m"}, **case["spec"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_machine_needs_what_the_table_says(case):
    text = yaml.safe_dump(spec_of(case))
    if "refused" in case:
        with pytest.raises(SpecError) as caught:
            EndpointSpec.parse(text)
        assert case["refused"] in str(caught.value)
        return
    need = host_memory(EndpointSpec.parse(text))
    assert need.ranks == case["ranks"]
    found = {name: getattr(need, f"{name}_mib") for name in case["mib"]}
    assert found == case["mib"]


def test_a_refusal_shows_the_sum():
    text = yaml.safe_dump(
        spec_of({"spec": {"offload": {"host_gib": 8}, "memory": {"limit_gib": 8}}})
    )
    with pytest.raises(SpecError) as caught:
        EndpointSpec.parse(text)
    assert "needs 24 GiB (offloaded KV 8, weights 4, /dev/shm 2, reserve 10)" in str(caught.value)
