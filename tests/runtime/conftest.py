import pytest


@pytest.fixture(scope="session")
def sglang():
    """SGLang imported, with our plugin loaded as it loads itself."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang

    return sglang


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model's directory."""
    from tests.tiny_llama import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))
