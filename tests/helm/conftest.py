"""The tools are fetched once; afterwards nothing here needs the network."""

from pathlib import Path

import pytest

from tests.helm import chart

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("helm")


@pytest.fixture(scope="session", autouse=True)
def helm_tools():
    chart.tools.fetch()
