import pytest
import torch

from hip_sglang.runtime import chunks

PAGE = 64


@pytest.fixture
def adder(sglang, monkeypatch):
    """SGLang's own, over ``pages`` free pages, with ``running`` decode steps beside a chunk."""
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.chunk_cache import ChunkCache

    from hip_sglang.runtime.allocator import HostPagedAllocator

    def make(chunk, *, running, pages=100, ours=True):
        monkeypatch.setattr(chunks, "_ours", lambda: ours)
        tokens = pages * PAGE
        allocator = HostPagedAllocator(
            tokens, PAGE, torch.float32, "cpu", kvcache=None, need_sort=False
        )
        cache = ChunkCache(
            CacheInitParams(
                disable=True,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=allocator,
                page_size=PAGE,
            )
        )
        return PrefillAdder(PAGE, cache, allocator, None, 0.5, 4096, chunk, running)

    return make


@pytest.mark.parametrize(
    ("chunk", "running", "left"),
    [(704, 0, 704), (704, 1, 640), (704, 64, 640), (704, 65, 576), (64, 3, 64), (64, 80, 64)],
)
def test_decode_steps_take_whole_pages_off_a_chunk(adder, chunk, running, left):
    assert adder(chunk, running=running).rem_chunk_tokens == left


def test_memory_takes_whole_pages_off_a_chunk(adder):
    made = adder(704, running=10, pages=3)
    assert made.memory_budget.available_chunk_tokens(704) == 128


def test_a_chunk_gets_on_where_less_than_a_page_is_left(adder):
    made = adder(704, running=10, pages=1)
    assert made.memory_budget.available_chunk_tokens(704) == PAGE


def test_without_chunks_there_is_nothing_to_align(adder):
    assert adder(None, running=5).rem_chunk_tokens is None


def test_other_backends_keep_sglangs_chunks(adder):
    made = adder(704, running=10, pages=3, ours=False)
    assert made.rem_chunk_tokens == 694
    assert made.memory_budget.available_chunk_tokens(694) == 182
