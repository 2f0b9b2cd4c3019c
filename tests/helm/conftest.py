"""The tools are fetched once; afterwards nothing here needs the network."""

import pytest

from tests.helm import chart


@pytest.fixture(scope="session", autouse=True)
def helm_tools():
    chart.tools.fetch()
