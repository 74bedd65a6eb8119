"""Streams, graphs, threads and several devices: what only a card has, and no host can play."""

import threading

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import ResourceError
from sela_ext.kernels import reference

pytestmark = pytest.mark.gpu
CYCLES = 50_000_000  # tens of milliseconds: long enough for a missing dependency to show


@pytest.fixture
def logits():
    return torch.randn(3000, 257, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def expected(logits):
    return reference.sinkhorn_pass(logits, np.zeros(257), want_labels=True)


def assert_found(found, expected):
    torch.testing.assert_close(found.column_sums.cpu(), expected.column_sums, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.lse.cpu(), expected.lse, rtol=1e-6, atol=1e-5)
    assert found.objective == pytest.approx(expected.objective, rel=1e-6)
    assert float((found.labels.cpu() != expected.labels).double().mean()) < 1e-3  # near ties


def test_the_pass_waits_for_its_stream(cuda, logits, expected):
    ready = logits.to(cuda.place)
    late = torch.full_like(ready, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        late.copy_(ready)
        found = kernels.sinkhorn_pass(late, np.zeros(257), want_labels=True)
    stream.synchronize()
    assert_found(found, expected)
    assert found.masked == 0


def test_results_are_ready_for_what_follows_on_the_same_stream(cuda, logits, expected):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_card = logits.to(cuda.place)
        first = kernels.sinkhorn_pass(on_card, np.zeros(257))
        second = kernels.sinkhorn_pass(on_card, np.zeros(257), reference=first.lse, want_labels=True)
        doubled = second.column_sums * 2
    stream.synchronize()
    assert_found(second, expected)
    assert torch.equal(doubled.cpu(), second.column_sums.cpu() * 2)


def test_passes_on_two_streams_do_not_disturb_one_another(cuda, logits, expected):
    on_card = logits.to(cuda.place)
    torch.cuda.synchronize()
    streams, found = (torch.cuda.Stream(), torch.cuda.Stream()), []
    for i in range(10):
        with torch.cuda.stream(streams[i % 2]):
            found.append(kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True))
    torch.cuda.synchronize()
    for sums in found:
        assert_found(sums, expected)
        assert torch.equal(sums.column_sums, found[0].column_sums)


def test_passes_from_two_threads_do_not_disturb_one_another(cuda, logits, expected):
    on_card, found = logits.to(cuda.place), []
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found.append(kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for sums in found:
        assert_found(sums, expected)
        assert torch.equal(sums.column_sums, found[0].column_sums)


def test_a_pass_inside_a_graph_is_refused_and_harms_nothing(cuda, logits, expected):
    on_card = logits.to(cuda.place)
    kernels.sinkhorn_pass(on_card, np.zeros(257))  # warm
    counter = torch.zeros(1, device=cuda.place)
    counter.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter.add_(1)
        with pytest.raises(ResourceError, match="expected a stream that is not being captured"):
            kernels.sinkhorn_pass(on_card, np.zeros(257))
    counter.zero_()
    graph.replay()
    graph.replay()
    assert counter.item() == 2
    assert_found(kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True), expected)


def test_the_current_device_is_restored_and_need_not_be_that_of_the_logits(cuda, logits, expected):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    torch.cuda.set_device(0)
    for index in range(torch.cuda.device_count()):
        verdict = kernels.device_verdict(index)
        if not verdict.usable:
            continue
        on_card = logits.to(f"cuda:{index}")
        found = kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True)
        assert torch.cuda.current_device() == 0
        assert found.column_sums.device == found.lse.device == found.labels.device == on_card.device
        assert_found(found, expected)
        # Arguments on another device are brought over.
        found = kernels.sinkhorn_pass(
            on_card, torch.zeros(257, device="cuda:0"), reference=found.lse.to("cuda:0"), want_labels=True
        )
        assert_found(found, expected)


def test_memory_is_returned(cuda, logits):
    on_card = logits.to(cuda.place)
    kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        kernels.sinkhorn_pass(on_card, np.zeros(257), want_labels=True)
    assert torch.cuda.memory_allocated() == before
