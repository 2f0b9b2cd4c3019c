"""An endpoint's document, at the door: ``hip-cluster validate`` and ``explain``."""

import json
from itertools import pairwise

import pytest
import yaml
from hip_cluster.arguments import server_arguments
from hip_cluster.cli import run
from hip_cluster.engine import device_index
from hip_cluster.spec import EndpointSpec
from hip_cluster.submit import submission_id
from hip_cluster.timing import hang_seconds

GOOD = {"name": "llama", "model": {"path": "/models/llama"}}


@pytest.fixture
def document(tmp_path):
    def write(content):
        path = tmp_path / "endpoint.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


@pytest.fixture
def refused(document, capsys):
    def lines(content):
        path = document(content)
        assert run(["validate", "-f", path]) == 2
        shown = capsys.readouterr().err.splitlines()
        return [line.removeprefix(f"hip-cluster: {path}: ") for line in shown]

    return lines


def test_a_small_document_is_enough(document, capsys):
    assert run(["validate", "-f", document(GOOD)]) == 0
    assert "endpoint llama is valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"replcas": 2}, "replcas: unknown key; did you mean replicas?"),
        ({"parallel": {"tpp": 2}}, "parallel.tpp: unknown key; did you mean tp?"),
        (
            {"offload": {"host_gib": 1, "zzz": 1}},
            "offload.zzz: unknown key; the keys here are host_gib, device_tokens, "
            "miss_policy, disk",
        ),
        ({"parallel": {"tp": "2"}}, "parallel.tp=2: input should be a valid integer"),
        ({"parallel": {"tp": 0}}, "parallel.tp=0: input should be greater than or equal to 1"),
        ({"name": "Llama"}, "name=Llama: string should match pattern"),
        ({"model": {}}, "model.path: missing; give it"),
        ({"offload": {}}, "offload.host_gib: missing; give it"),
        ({"replicas": 2}, "replicas=2 need something before them; set router.mode to managed"),
        (
            {"replicas": 2, "router": {"mode": "external"}},
            "with router.mode external each replica has a document of its own",
        ),
        ({"router": {"mode": "nginx"}}, "router.mode=nginx: input should be 'none', 'managed'"),
        (
            {"router": {"mode": "external", "policy": "round_robin"}},
            "router: policy is for a router that is started here; take it out, or set mode to",
        ),
        (
            {"router": {"mode": "managed", "notice_s": 5.0}},
            "router: notice_s is for mode external; take it out",
        ),
        (
            {"auth": {"api_key_file": "k", "api_key_env": "K"}},
            "auth: give api_key_file or api_key_env, not both",
        ),
        ({"hip": {"config": {"budgett": 1}}}, "hip.config: unknown key 'budgett'; did you mean"),
        ({"server": {"arguments": ["--tp=4"]}}, "--tp is this document's parallel.tp; say it"),
        (
            {"server": {"arguments": ["--api-key", "s3cret"]}},
            "--api-key is this document's auth.api_key_file or auth.api_key_env; say it there",
        ),
        (
            {"hip": {"config": {"offload": {"host_gib": 1}}}},
            "hip.config.offload: the document has a section `offload`; say it there",
        ),
        ({"limits": {"drain_s": -1}}, "limits.drain_s=-1: input should be greater than 0"),
    ],
)
def test_each_problem_is_one_line_with_its_path(refused, more, line):
    (shown,) = refused(GOOD | more)
    assert line in shown


def test_a_key_in_the_arguments_is_not_shown(refused):
    (shown,) = refused(GOOD | {"server": {"arguments": ["--api-key=s3cret"]}})
    assert "s3cret" not in shown


def test_several_problems_are_several_lines(refused):
    assert len(refused({"name": "x y", "replicas": 0})) == 3


def test_yaml_that_is_none_is_told_with_its_place(refused):
    (shown,) = refused("name: [a\nmodel: b")
    assert shown.startswith("not valid YAML at line 2")


def test_a_key_that_stands_twice_is_refused(refused):
    (shown,) = refused("name: a\nname: b\nmodel: {path: m}")
    assert "'name' is given twice" in shown


def test_a_file_that_is_not_there_is_one_line(capsys):
    assert run(["validate", "-f", "/nowhere/e.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_of_sglang_follows_from_the_document():
    spec = EndpointSpec.model_validate(
        GOOD
        | {
            "parallel": {"tp": 2, "nodes": 2, "device": "cpu"},
            "hip": {"preset": "balanced", "config": {"budget": 4096}},
            "offload": {"host_gib": 8.0, "disk": {"path": "/kv", "gib": 100}},
            "server": {"arguments": ["--enable-metrics"]},
        }
    )
    line = server_arguments(spec, "10.0.0.1", 31000)
    pairs = dict(pairwise(line))
    assert (pairs["--tp-size"], pairs["--nnodes"], pairs["--device"]) == ("2", "2", "cpu")
    assert (pairs["--host"], pairs["--port"]) == ("10.0.0.1", "31000")
    assert pairs["--attention-backend"] == "hip_attention"
    assert json.loads(pairs["--hip-config"]) == {
        "budget": 4096,
        "preset": "balanced",
        "offload": {
            "host_gib": 8.0,
            "miss_policy": "fetch",
            "disk": {"path": "/kv", "gib": 100.0},
        },
    }
    assert line[-1] == "--enable-metrics"


@pytest.mark.parametrize(
    ("assigned", "visible", "index"),
    [("3", None, 3), ("3", "3", 0), ("3", "1,3", 1), ("3", "0,1,2,3", 3), ("0", "", 0)],
)
def test_a_rank_uses_the_gpu_that_ray_gave_it(assigned, visible, index):
    assert device_index(assigned, visible) == index


def test_a_document_has_one_submission_id_however_it_is_laid_out():
    spec = EndpointSpec.parse(yaml.safe_dump(GOOD))
    assert submission_id(EndpointSpec.parse(json.dumps(GOOD, indent=4))) == submission_id(spec)
    other = EndpointSpec.model_validate(GOOD | {"parallel": {"tp": 2}})
    assert submission_id(other) != submission_id(spec)
    assert submission_id(spec).startswith("llama-")


def test_explain_says_where_and_how_much(document, capsys):
    content = GOOD | {"parallel": {"tp": 16, "nodes": 2}, "offload": {"host_gib": 256}}
    assert run(["explain", "-f", document(content)]) == 0
    shown = capsys.readouterr().out
    assert "2 machines with 8 CPU, 8 GPU free on each" in shown
    assert "needs 300 GiB (offloaded KV 256, weights 32, /dev/shm 2, reserve 10)" in shown
    assert "each rank offloads 32.0 GiB" in shown
    assert run(["explain", "--json", "-f", document(content)]) == 0
    assert json.loads(capsys.readouterr().out)["memory_mib"]["total"] == 307200


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ({}, "clients reach SGLang's server at 127.0.0.1:30000"),
        ({"mode": "managed"}, "clients reach a router at 127.0.0.1:30000, which chooses a replica"),
        (
            {"mode": "external", "notice_s": 20.0},
            "no router is started: yours finds SGLang's server at 127.0.0.1:30000 by its /health, "
            "which answers 503 while it drains; it goes on to serve for 20 s then",
        ),
    ],
)
def test_explain_says_whom_clients_reach(document, capsys, router, said):
    content = document(GOOD | {"router": router})
    assert run(["explain", "-f", content]) == 0
    assert said in capsys.readouterr().out
    assert run(["explain", "--json", "-f", content]) == 0
    assert json.loads(capsys.readouterr().out)["router"] == router.get("mode", "none")


def test_the_schema_accepts_what_is_valid_and_nothing_unknown(capsys):
    from jsonschema import Draft202012Validator

    assert run(["schema"]) == 0
    validator = Draft202012Validator(json.loads(capsys.readouterr().out))
    assert not list(validator.iter_errors(GOOD | {"replicas": 2}))
    assert list(validator.iter_errors(GOOD | {"replcas": 2}))


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({}, 20 + 8192 / 500),
        ({"parallel": {"device": "cpu"}}, 20 + 4096 / 50),
        ({"server": {"arguments": ["--chunked-prefill-size", "1000"]}}, 22),
        ({"server": {"arguments": ["--chunked-prefill-size=1000"]}}, 22),
        (
            {
                "model": {"path": "m", "context_length": 50000},
                "server": {"arguments": ["--chunked-prefill-size", "-1"]},
            },
            120,
        ),
        ({"limits": {"hang_s": 7.0}}, 7),
    ],
)
def test_a_hang_is_told_by_the_size_of_a_chunk(more, seconds):
    assert hang_seconds(EndpointSpec.model_validate(GOOD | more)) == pytest.approx(seconds)
