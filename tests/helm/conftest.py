"""The tools are fetched once; afterwards nothing here needs the network."""

from pathlib import Path

import pytest

from tests.helm import api, chart

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("helm")


@pytest.fixture(scope="session", autouse=True)
def helm_tools():
    chart.tools.fetch()


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory):
    """A real API server with the resources of the operators; skipped where none was built."""
    if not api.server.there():
        pytest.skip("no kube-apiserver: `make helm-e2e` builds one")
    with api.running(tmp_path_factory.mktemp("kubernetes")) as cluster:
        api.define(cluster)
        yield cluster
