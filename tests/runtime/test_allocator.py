import pytest
import torch

PAGE = 64


@pytest.fixture
def allocator(sglang):
    from hip_sglang.runtime.allocator import HostPagedAllocator

    return HostPagedAllocator(16 * PAGE, PAGE, torch.float32, "cpu", kvcache=None, need_sort=False)


class Request:
    """A request's slots as SGLang keeps them, grown through the allocator."""

    def __init__(self):
        self.slots = torch.empty(0, dtype=torch.int64)

    @property
    def last(self):
        return int(self.slots[-1]) if len(self.slots) else -1


def extend(allocator, requests, lengths):
    prefix = torch.tensor([len(request.slots) for request in requests])
    seq = prefix + torch.tensor(lengths)
    last = torch.tensor([request.last for request in requests])
    slots = allocator.alloc_extend(prefix, prefix, seq, seq, last, sum(lengths))
    if slots is not None:
        for request, new in zip(requests, slots.split(lengths), strict=True):
            request.slots = torch.cat([request.slots, new])
    return slots


def decode(allocator, requests):
    seq = torch.tensor([len(request.slots) + 1 for request in requests])
    last = torch.tensor([request.last for request in requests])
    slots = allocator.alloc_decode(seq, seq, last)
    if slots is not None:
        for request, slot in zip(requests, slots, strict=True):
            request.slots = torch.cat([request.slots, slot[None]])
    return slots


def assert_paged(requests):
    """Token p of a request lies at offset p % 64 of its page, and pages are not shared."""
    owners = {}
    for request in requests:
        positions = torch.arange(len(request.slots))
        assert torch.equal(request.slots % PAGE, positions % PAGE)
        for page in (request.slots // PAGE).unique_consecutive().tolist():
            assert page > 0, "page 0 is for padding"
            assert owners.setdefault(page, request) is request
        assert len(request.slots.unique()) == len(request.slots)


def test_requests_of_odd_lengths_grow_in_pages_of_their_own(allocator):
    requests = [Request(), Request(), Request()]
    extend(allocator, requests, [1, 64, 65])
    assert_paged(requests)
    extend(allocator, requests, [63, 1, 130])
    assert_paged(requests)
    for _ in range(70):
        decode(allocator, requests)
    assert_paged(requests)
    pages = sum(-(-len(request.slots) // PAGE) for request in requests)
    assert allocator.available_size() == (16 - pages) * PAGE


def test_a_full_pool_answers_none_and_loses_nothing(allocator):
    first, second = Request(), Request()
    extend(allocator, [first], [15 * PAGE])
    before = allocator.available_size()
    assert extend(allocator, [second], [PAGE + 1]) is None
    assert allocator.available_size() == before == PAGE
    assert extend(allocator, [second], [PAGE]) is not None
    assert decode(allocator, [first, second]) is None
    assert allocator.available_size() == 0


def test_the_last_page_is_used_up_before_a_new_one_is_needed(allocator):
    request = Request()
    extend(allocator, [request], [15 * PAGE + 1])
    assert allocator.available_size() == 0
    assert extend(allocator, [request], [62]) is not None
    assert decode(allocator, [request]) is not None
    assert decode(allocator, [request]) is None
    assert_paged([request])


def test_freed_pages_come_back(allocator):
    request = Request()
    extend(allocator, [request], [200])
    allocator.free(request.slots)
    assert allocator.available_size() == 16 * PAGE
    assert len(allocator.get_all_free_pages().unique()) == 16
