"""Every symbol of SGLang that we lean on: a test here goes red when it moves or changes."""

import argparse
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch

from hip_sglang.runtime import compat, host_platform, plugin
from hip_sglang.runtime.requirements import UnsupportedError

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.parametrize("hook", compat.HOOKS, ids=lambda hook: hook.target)
def test_every_target_is_patched(hook):
    assert hook.target not in compat.missing()
    owner, name = hook.target.rsplit(".", 1)
    patched = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    patched = getattr(patched, "__func__", patched)
    assert patched.__wrapped__ is not None
    assert hook.why


def test_a_symbol_that_moved_is_reported(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    moved = compat.Hook("sglang.srt.utils.common.moved_away", lambda original: None, "a test")
    monkeypatch.setattr(compat, "HOOKS", (*compat.HOOKS, moved))
    HookRegistry.register(moved.target, moved.hook, HookType.AROUND)
    try:
        HookRegistry.apply_hooks()
        assert compat.missing() == [moved.target]
        with pytest.raises(UnsupportedError, match="moved_away could not be hooked"):
            plugin.check_loaded()
    finally:
        del HookRegistry._hooks[moved.target]


def test_a_failed_load_is_raised_again_where_the_user_sees_it(monkeypatch):
    monkeypatch.setattr(plugin, "_problems", ["hip_attention could not be loaded: why"])
    with pytest.raises(UnsupportedError, match="could not be loaded: why"):
        plugin.check_loaded()


def test_the_backend_is_registered():
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    assert ATTENTION_BACKEND_CHOICES.count("hip_attention") == 1
    assert ATTENTION_BACKENDS["hip_attention"] is plugin.build_backend


def test_a_rank_whose_pages_are_not_the_server_s_refuses():
    with pytest.raises(UnsupportedError, match=r"not --page-size 16; .* HIP_SGLANG_PAGE_SIZE"):
        plugin.build_backend(SimpleNamespace(page_size=16))


def test_sglang_still_has_the_two_resolution_steps():
    from sglang.srt.arg_groups import pipeline
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS

    source = inspect.getsource(pipeline.run_resolution_pipeline)
    steps = ["handle_missing_default_values", "handle_attention_backend_compatibility"]
    places = [source.index(f"run_hook({step}, server_args)") for step in steps]
    # ours must come before SGLang fills in a page size, and the second after the first
    assert places == sorted(places)
    assert places[-1] < source.index("run_post_process_pass(server_args, _page_size_default)")
    assert [len(_HOOKS[step]) for step in steps] == [1, 1]


def test_the_parser_knows_our_flags():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(
        ["--model-path", "m", "--hip-config", '{"budget": 128}', "--hip-preset", "quality"]
    )
    config = ServerArgs.from_cli_args(args)._hip_config
    assert (config.budget, config.prefill) == (128, "dense")


def test_engine_takes_our_keywords():
    from sglang.srt.entrypoints.engine import Engine

    assert "server_args = self.server_args_class(**kwargs)" in inspect.getsource(Engine.__init__)
    server_args = Engine.server_args_class(model_path="m", hip_config={"budget": 128})
    assert server_args._hip_config.budget == 128
    assert not hasattr(Engine.server_args_class(model_path="m"), "_hip_config")


def test_the_configuration_is_pickled_with_the_server_arguments():
    import pickle

    from sglang.srt.entrypoints.engine import Engine

    from hip_sglang.runtime.doors import config_of

    server_args = Engine.server_args_class(model_path="m", hip_preset="dense")
    assert config_of(pickle.loads(pickle.dumps(server_args))).decode == "dense"


@pytest.mark.skipif(host_platform.has_accelerator(), reason="this machine has an accelerator")
class TestWithoutAnAccelerator:
    def test_our_platform_is_active(self):
        from sglang.srt.platforms import current_platform
        from sglang.srt.utils.common import get_device

        assert host_platform.is_active()
        assert current_platform.is_out_of_tree()
        assert get_device() == "cpu"

    def test_triton_is_launched_by_no_backend(self):
        from sglang.srt import utils
        from sglang.srt.mem_cache import allocation
        from sglang.srt.model_executor import forward_batch_info

        # each holds its own reference, made before or after the hook
        for module in (utils, utils.common, allocation, forward_batch_info):
            assert module.support_triton("hip_attention") is False
            assert module.support_triton("triton") is False

    def test_the_last_location_is_read_in_torch(self):
        from sglang.srt.mem_cache.allocation import get_last_loc

        table = torch.arange(100, 120, dtype=torch.int32).view(2, 10)
        last = get_last_loc(table, torch.tensor([1, 0]), torch.tensor([3, 0]))
        assert last.tolist() == [112, -1]

    def test_the_pool_and_the_allocator_are_for_the_cpu(self):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.platforms import current_platform

        from hip_sglang.runtime.allocator import HostPagedAllocator

        assert current_platform.get_mha_kv_pool_cls() is MHATokenToKVPool
        assert current_platform.get_paged_allocator_cls() is HostPagedAllocator

    def test_torchvision_can_be_imported(self):
        torchvision = pytest.importorskip("torchvision")
        assert torchvision.__version__
        assert torch.ops.torchvision.nms is not None


def test_sglangs_own_cpu_engine_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_platform, "has_accelerator", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert host_platform.activate() is None


def test_an_accelerator_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_platform, "has_accelerator", lambda: True)
    assert host_platform.activate() is None
