"""Online balanced targets as a torch operator: in compiled functions, and without a look from the host."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import sela_ext
from sela_ext.assign import batch, ops
from sela_ext.errors import DataError, OptionError, ResourceError

SIZES = [(0, 3, 0), (1, 1, 0), (1, 31, 2), (33, 1, 31), (1001, 33, 7)]


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cosines(rows, cols, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    return (torch.rand(rows, cols, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def loss_of(scores, queue=None, iterations=3, lam=20.0, marginals=None):
    targets = sela_ext.assign_batch(scores, queue, iterations, lam=lam, marginals=marginals)
    return -(targets * (scores / 0.1).log_softmax(1)).sum(1).mean()


# Of torch itself, where the inputs require gradients and no output does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("rows", "cols", "past"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(rows, cols, past, dtype):
    scores, queue = cosines(rows, cols, dtype), cosines(past, cols, dtype) if past else None
    for arguments in ((scores, queue), (scores.requires_grad_(), queue, 2, 10.0)):
        assert set(torch.library.opcheck(torch.ops.sela.assign_batch.default, arguments).values()) == {"SUCCESS"}
    sizes = torch.arange(1, cols + 1)
    done = torch.library.opcheck(torch.ops.sela.assign_batch_marginals.default, (scores.detach(), queue, 3, 9.0, sizes))
    assert set(done.values()) == {"SUCCESS"}


def test_a_compiled_training_step_has_the_targets_and_gradients_of_the_plain_one():
    torch._dynamo.utils.counters.clear()
    function = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for rows in (33, 31, 1001, 129):
        scores, queue = cosines(rows, 17).requires_grad_(), cosines(9, 17)
        found, wanted = function(scores, queue), loss_of(scores, queue)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (found, wanted)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for 33 rows, one for any number


@pytest.mark.parametrize("marginals", [None, [1.0, 2, 3, 4, 5], (5, 4, 3, 2, 1), torch.arange(1, 6)])
def test_options_are_taken_while_compiling(marginals):
    def targets(scores, iterations, lam):
        return sela_ext.assign_batch(scores.t(), iterations=iterations, lam=lam, marginals=marginals) * 2

    function = torch.compile(targets, fullgraph=True, backend="aot_eager")
    scores = cosines(5, 31, torch.float64)
    for iterations, lam in ((3, 20.0), (1, 20.0), (4, 5.0), (2, 1.0)):
        wanted = targets(scores, iterations, lam)
        torch.testing.assert_close(function(scores, iterations, lam), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "compiler",
    [
        "targets",  # nothing for a compiler to do around the operator
        pytest.param("loss", marks=pytest.mark.slow),
    ],
)
def test_the_default_backend_compiles_it(compiler, tmp_path, monkeypatch):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = loss_of if compiler == "loss" else sela_ext.assign_batch
    scores = cosines(31, 17)
    torch.testing.assert_close(torch.compile(plain, fullgraph=True)(scores), plain(scores))


def test_exported_programs_hold_the_operator():
    class Targets(torch.nn.Module):
        def forward(self, scores):
            return sela_ext.assign_batch(scores)

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Targets(), (cosines(31, 5),), dynamic_shapes=({0: rows},))
    assert "sela.assign_batch.default" in str(program.graph)
    scores = cosines(101, 5)
    torch.testing.assert_close(program.module()(scores), sela_ext.assign_batch(scores), rtol=0, atol=0)


def test_plain_calls_do_not_go_through_the_operator(monkeypatch):
    monkeypatch.setattr(ops, "assign_batch", None)
    assert sela_ext.assign_batch(cosines(5, 3)).shape == (5, 3)


@pytest.mark.parametrize(("rows", "cols", "past"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_form_for_devices_gives_the_same_targets(rows, cols, past, dtype):
    x = cosines(rows + past, cols, dtype)
    if rows > 20:
        x[3, -1], x[7], x[20, 0], x[rows:, 0] = torch.nan, -torch.inf, torch.inf, torch.nan
        x[: rows // 2, cols // 2] = -torch.inf
    shares = torch.full((cols,), 1.0 / cols, dtype=dtype).log()
    found = batch._sinkhorn_masked(x, 4, 20.0, shares, rows)
    wanted = batch._sinkhorn(x, 4, 20.0, shares, rows)
    rounding = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)
    assert bool(torch.isfinite(found).all())
    nothing = torch.full_like(x, torch.nan)
    assert not bool(batch._sinkhorn_masked(nothing, 2, 20.0, shares, rows).any())


def test_the_form_for_devices_never_looks_at_the_data():
    with FakeTensorMode():
        scores = torch.empty(33, 3, device="cuda:1")
        found = batch.batch_targets(scores, scores[:5], 3, 20.0, None)
        assert (found.device, found.shape, found.dtype) == (scores.device, (33, 3), torch.float32)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            batch._sinkhorn(scores, 3, 20.0, torch.zeros(3, device="cuda:1"), 33)  # the form for the CPU does


def test_marginals_are_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        scores = torch.empty(33, 3, device="cuda")
        assert batch.batch_targets(scores, None, 3, 20.0, None).shape == (33, 3)
        with pytest.raises(ResourceError, match="marginals: expected None while a CUDA graph is captured"):
            batch.batch_targets(scores, None, 3, 20.0, [1, 2, 3])


def test_wrong_arguments_are_refused():
    scores = cosines(5, 3)
    for arguments, error, message in (
        ((scores.int(),), DataError, "logits: expected float32"),
        ((scores, cosines(4, 2)), DataError, r"queue: expected a torch tensor \[Q, 3\]"),
        ((scores, None, 0), OptionError, "iterations: expected an integer in"),
        ((scores, None, 3, -1.0), OptionError, "lam: expected a number in"),
        ((scores, None, 3, 20.0, [1, 2]), OptionError, "marginals: expected shape"),
        ((scores, None, 3, 20.0, [1, 2, 0]), OptionError, "marginals: expected numbers > 0"),
    ):
        with pytest.raises(error, match=message):
            ops.assign_batch(*arguments)
    with FakeTensorMode(), pytest.raises(OptionError, match="queue: expected a tensor on cuda:0 as scores, found cpu"):
        torch.ops.sela.assign_batch.default(torch.empty(5, 3, device="cuda:0"), torch.empty(5, 3))
    function = torch.compile(sela_ext.assign_batch, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"queue: expected a torch tensor \[Q, 3\]"):
        function(scores, cosines(4, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_holds_it():
    scores, queue = cosines(64, 30).cuda(), cosines(7, 30).cuda()
    wanted = sela_ext.assign_batch(scores, queue)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sela_ext.assign_batch(scores, queue)
    graph.replay()
    torch.testing.assert_close(found, wanted)
    scores.copy_(cosines(64, 29 + 1).flip(0))
    graph.replay()
    torch.testing.assert_close(found, sela_ext.assign_batch(scores, queue))
    function = torch.compile(loss_of, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.testing.assert_close(function(scores, queue), loss_of(scores, queue))
