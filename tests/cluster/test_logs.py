"""The log of an endpoint: JSON lines, whoever printed them."""

import io
import json
import logging

from hip_cluster import logs
from hip_cluster.request_log import RequestLog, tell


def shown(batch):
    output = io.StringIO()
    logs.print_lines(batch, output)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_what_a_library_prints_gets_its_process_and_what_we_print_passes():
    ours = '{"timestamp": "now", "message": "request ended", "request_id": "a"}'
    batch = {"lines": ["plain {words", ours, " "], "actor_name": "replica 0 rank 1"}
    first, second = shown({**batch, "pid": 7, "ip": "10.0.0.1", "is_err": False})
    assert (first["message"], first["process"]) == ("plain {words", "replica 0 rank 1")
    assert (first["pid"], first["node"]) == (7, "10.0.0.1")
    assert second == json.loads(ours)


def test_what_ray_says_of_its_cluster_every_five_seconds_is_left_out():
    assert shown({"lines": ["Node status"], "pid": "autoscaler", "is_err": False}) == []


def test_two_ranks_that_say_the_same_are_both_heard():
    lines = [shown({"lines": ["ready"], "pid": pid, "is_err": True}) for pid in (1, 2)]
    assert [one["pid"] for (one,) in lines] == [1, 2]


def test_a_failure_is_one_line(capsys):
    logs.start("supervisor")
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("hip_cluster").exception("it failed: %s", "here")
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert (record["level"], record["message"]) == ("ERROR", "it failed: here")
    assert record["process"] == "supervisor"
    assert record["exception"].endswith("ValueError: wrong")


def test_a_request_of_several_prompts_keeps_the_id_of_its_client(capsys):
    logs.start("engine")

    class Given:
        rid = ("mine.0123abcd_0", "mine.0123abcd_1")

    class Sglang:
        def log_received_request(self, *given):
            print("sglang")

    RequestLog(Sglang()).log_received_request(Given())
    tell("request ended", "of.its.own")
    *ours, sglang, other = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["request_id"] for line in ours] == ["mine", "mine"]
    assert sglang == "sglang"
    assert json.loads(other)["request_id"] == "of.its.own"
