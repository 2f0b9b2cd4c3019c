"""The API key comes from a file, and shows in no log."""

import pickle

import pytest

from hip_sglang.secret import FILE_VARIABLE, Secret


@pytest.fixture
def resolve(sglang, model, monkeypatch):
    def resolve(file, *args):
        from sglang.srt.server_args import prepare_server_args

        monkeypatch.setenv(FILE_VARIABLE, str(file))
        server_args = prepare_server_args(["--model-path", str(model), *args])
        server_args.resolve_once()
        return server_args.resolved_dict()

    return resolve


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key"
    path.write_text("sesame\n")
    return path


@pytest.mark.parametrize("backend", ["hip_attention", "torch_native"])
def test_the_key_is_what_the_file_holds(resolve, file, backend):
    resolved = resolve(file, "--attention-backend", backend)
    assert resolved["api_key"] == "sesame"
    assert "sesame" not in repr(resolved)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file"), ("\n", "it is empty"), (b"\xff", "text file")]
)
def test_a_file_without_a_key_is_refused(resolve, tmp_path, capsys, content, problem):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        resolve(path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"hip-sglang: error: {FILE_VARIABLE}={path}: ")
    assert problem in line


def test_a_key_given_twice_is_refused(resolve, file, capsys):
    with pytest.raises(SystemExit):
        resolve(file, "--api-key", "other")
    assert "--api-key and HIP_SGLANG_API_KEY_FILE" in capsys.readouterr().err


def test_a_key_travels_to_ranks_and_stays_hidden():
    """SGLang pickles its arguments to every rank."""
    key = pickle.loads(pickle.dumps(Secret("sesame")))
    assert (key, repr(key)) == ("sesame", "'***'")
