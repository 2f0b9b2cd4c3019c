"""The built-in model and a document, made once for all tests of the demo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hip_sglang.demo.corpus import Document, library_text
from hip_sglang.demo.model import write_model
from hip_sglang.demo.vocabulary import Tokenizer, load_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """These tensors are small: more threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def library() -> str:
    return library_text()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "model"
    write_model(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_directory: Path) -> Tokenizer:
    return load_tokenizer(model_directory)


@pytest.fixture(scope="session")
def document(library: str, tokenizer: Tokenizer) -> Document:
    return Document.cut(library, tokenizer, 2048)
