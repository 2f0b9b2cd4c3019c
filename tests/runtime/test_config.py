import json
import pickle

import pytest

from hip_sglang.config import HipConfig
from hip_sglang.config_text import ConfigError


def complaint(*args):
    with pytest.raises(ConfigError) as caught:
        HipConfig.load(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_the_balanced_preset():
    config = HipConfig.load()
    assert (config.preset, config.prefill, config.decode) == ("balanced", "sparse", "sparse")
    assert (config.sink, config.window, config.budget) == (64, 1024, 2048)
    assert config.dense_threshold == 8192
    assert config.remainder == "harmonic"
    assert config.sub_page_means is True
    assert config.trace is None


@pytest.mark.parametrize(
    ("preset", "prefill", "decode", "looks"),
    [
        ("balanced", "sparse", "sparse", 2),
        ("quality", "dense", "sparse", 8),
        ("dense", "dense", "dense", 2),
    ],
)
def test_a_preset_decides_about_both_phases(preset, prefill, decode, looks):
    for config in (HipConfig.load(None, preset), HipConfig.load(json.dumps({"preset": preset}))):
        assert (config.prefill, config.decode) == (prefill, decode)
        plan = config.layer_plan(0)
        assert (plan.sparse_from is not None) == (prefill == "sparse")
        assert (plan.sparse_decode_from is not None) == (decode == "sparse")
        assert config.second_look == looks


def test_the_paper_preset_searches_and_drops():
    plan = HipConfig.load(None, "paper").layer_plan(0)
    assert (plan.pages.strategy, plan.pages.remainder) == ("tree", "none")
    assert (plan.sparse_from, plan.sparse_decode_from) == (8192, 8192)
    # 32 chunks of 1,023 pages take five halvings, and nothing reads a summary
    assert plan.share_read(1023, 50) == pytest.approx((2 * 50 * 64 + 64 * 5) / (128 * 1024))


def test_a_layer_may_have_a_budget_of_its_own():
    groups = [{"layers": [1, 3], "budget": 100, "refresh": 4}, {"layers": [2], "top_p": 0.9}]
    config = HipConfig.load({"budget": 4096, "per_layer": groups})
    plans = [config.layer_plan(layer) for layer in range(5)]
    assert [plan.pages.budget_pages for plan in plans] == [64, 2, 64, 2, 64]
    assert [plan.refresh for plan in plans] == [1, 4, 1, 4, 1]
    assert [plan.pages.top_p for plan in plans] == [1, 1, 0.9, 1, 1]
    assert config.refreshes == {1, 4}
    # what holds for all layers follows from the largest
    large = HipConfig.load({"per_layer": [{"layers": [1], "budget": 1 << 20}]})
    assert large.start == large.layer_plan(0).sparse_from > 1 << 20
    held = {"beam": 1024, "per_layer": [{"layers": [1], "budget": 4096, "refresh": 2}]}
    assert HipConfig.load(held).layer_plan(0).pages.beam == 64


def test_dense_layers_never_prune():
    config = HipConfig.load('{"dense_layers": [0, 3]}')
    assert [config.layer_plan(layer).prunes for layer in range(5)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_an_explicit_key_overrides_the_preset():
    config = HipConfig.load('{"preset": "dense", "decode": "sparse"}')
    assert (config.prefill, config.decode) == ("dense", "sparse")


def test_token_counts_are_rounded_up_to_pages():
    config = HipConfig.load('{"sink": 1, "window": 65, "budget": 129}')
    assert (config.sink, config.window, config.budget) == (64, 128, 192)
    pages = config.layer_plan(0).pages
    assert (pages.sink_pages, pages.window_pages, pages.budget_pages) == (1, 2, 3)


def test_a_choice_that_is_used_again_has_room_in_the_beam():
    little = {"budget": 2048, "beam": 1024, "node_threshold": 0}
    assert HipConfig.load(little).layer_plan(0).pages.beam == 2
    held = HipConfig.load({**little, "refresh": 2})
    assert held.layer_plan(0).pages.beam == held.layer_plan(0).pages.budget_pages == 32
    assert held.nodes_from == 32 * 512


def test_nodes_begin_where_a_node_does():
    # steps look for new nodes when one is full
    assert HipConfig.load({"node_threshold": 100_000}).nodes_from == 196 * 512


def test_nodes_are_for_whatever_prunes():
    threshold = 262144
    assert HipConfig.load({"decode": "dense"}).nodes_from == threshold
    assert HipConfig.load({"prefill": "dense"}).nodes_from == threshold
    assert HipConfig.load({"preset": "dense"}).nodes_from is None
    assert HipConfig.load({"strategy": "tree"}).nodes_from is None


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, 4),
        ({"second_look": 0}, 1),
        ({"refresh": 2}, 1),
        ({"sub_page_means": False}, 1),
        ({"preset": "paper"}, 1),
        ({"offload": {"host_gib": 1}, "second_look": 2}, 1),
        ({"refresh": 2, "per_layer": [{"layers": [0], "refresh": 1}]}, 4),
    ],
    ids=str,
)
def test_sub_pages_are_chosen_where_nothing_needs_whole_pages(given, parts):
    assert HipConfig.load(given).layer_plan(0).pages.parts == parts


def test_the_share_read_counts_summaries_and_the_second_look():
    plan = HipConfig.load(None).layer_plan(0)
    # 50 pages of keys and values, 64 of keys; 4 means, 1 deviation and 1 value of 1023 pages
    rows = 50 * 128 + 64 * 64 + 6 * 1023
    assert plan.share_read(1023, 50) == pytest.approx(rows / (128 * 1024))
    assert plan.share_read(10, 11) == 1
    # 1 << 18 tokens: 128 nodes of eight pages, and all nodes by one mean
    rows = 6 * 128 * 8 + 3 * 512 + 50 * 128 + 2 * 32 * 64
    assert plan.share_read(4096, 50) == pytest.approx(rows / (128 * 4097))
    plain = HipConfig.load('{"second_look": 0, "remainder": "none"}').layer_plan(0)
    assert plain.share_read(1023, 50) == pytest.approx((50 * 128 + 4 * 1023) / (128 * 1024))


def test_no_sink_is_a_choice():
    assert HipConfig.load('{"sink": 0}').layer_plan(3).pages.sink_pages == 0


def test_text_file_and_mapping_say_the_same(tmp_path):
    values = {"budget": 4096, "remainder": "mean"}
    file = tmp_path / "hip.json"
    file.write_text(json.dumps(values))
    expected = HipConfig.load(values)
    assert HipConfig.load(json.dumps(values)) == HipConfig.load(str(file)) == expected
    assert expected.budget == 4096


def test_it_travels_to_other_processes():
    config = HipConfig.load('{"budget": 128}', "quality")
    assert pickle.loads(pickle.dumps(config)) == config


def test_it_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        HipConfig().budget = 64


def test_every_key_is_documented_in_the_schema():
    properties = HipConfig.model_json_schema()["properties"]
    assert set(properties) == set(HipConfig.model_fields)
    assert all(entry.get("description") for entry in properties.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"buget": 64}', "unknown key 'buget'; did you mean budget?"),
        ('{"zzz": 64}', "unknown key 'zzz'; the keys are preset,"),
        ('{"budget": 63}', "budget=63 is too small; set budget to 64 (one page of 64 tokens)"),
        ('{"window": 0}', "window=0 is too small; set window to 1 or more"),
        ('{"sink": -1}', "sink=-1 is too small; set sink to 0 or more"),
        ('{"dense_layers": [-1]}', "dense_layers.0=-1 is too small"),
        ('{"per_layer": [{"layers": []}]}', "per_layer.0.layers"),
        ('{"per_layer": [{"layers": [1], "buget": 64}]}', "did you mean per_layer.0.budget?"),
        ('{"per_layer": [{"layers": [1], "budget": 1}]}', "per_layer.0.budget=1 is too small"),
        ('{"per_layer": [{"layers": [1, 1]}]}', "per_layer names layer 1, which is named before"),
        ('{"per_layer": [{"layers": [1]}], "dense_layers": [1]}', "name it once"),
        ('{"window": "wide"}', "window='wide' is not a whole number"),
        ('{"sink": true}', "sink=True is not a whole number"),
        ('{"sub_page_means": 1}', "sub_page_means=1 is neither true nor false"),
        ('{"preset": "fast"}', "preset='fast' is not known; choose 'balanced', 'quality', "),
        ('{"prefill": "off"}', "prefill='off' is not known; choose 'sparse' or 'dense'"),
        ('{"remainder": "x"}', "remainder='x' is not known; choose 'harmonic'"),
        ('{"trace": 4}', "trace=4"),
        ('{"trace": "/"}', "trace='/': it must be a file in a directory that exists"),
        ('{"trace": "/absent/t.jsonl"}', "it must be a file in a directory that exists"),
        ('{"budget": 64, "budget": 128}', "'budget' is given twice; keep one"),
        ("[1]", "expected a JSON object"),
        ('{"budget": }', "not valid JSON at line 1, column 12"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_the_remedy(text, expected):
    message = complaint(text)
    assert message.startswith("--hip-config: ")
    assert expected in message


def test_all_mistakes_are_told_at_once():
    message = complaint('{"sink": -1, "buget": 1}')
    assert "sink=-1" in message
    assert "'buget'" in message


def test_a_corrupt_file_is_named_with_line_and_column(tmp_path):
    file = tmp_path / "hip.json"
    file.write_text('{\n  "budget": 64,\n  "sink": oops\n}')
    assert f"{file}: not valid JSON at line 3, column 11" in complaint(str(file))


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "hip.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file}: not a text file" in complaint(str(file))


def test_a_missing_file_is_named(tmp_path):
    assert "absent.json: No such file" in complaint(str(tmp_path / "absent.json"))


def test_an_unknown_preset_of_the_flag_lists_the_presets():
    assert "choose 'balanced', 'quality', 'dense' or 'paper'" in complaint(None, "fast")


def test_two_presets_that_contradict_are_an_error():
    assert "contradicts --hip-preset quality" in complaint('{"preset": "dense"}', "quality")
    assert HipConfig.load('{"preset": "dense"}', "dense").decode == "dense"
