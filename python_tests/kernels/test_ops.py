"""The kernels as torch operators: what torch demands of operators, and the results of the plain functions."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import Augment, VectorView, device, ops
from sela_ext.kernels.logits import KINDS, bits_of, tensor_type

SIZES = [(1, 1), (1, 31), (31, 1), (33, 31), (1001, 33), (0, 5)]


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def card(as_cuda, host_card, monkeypatch):
    """A card that has passed its check already."""
    monkeypatch.setitem(device._usable, host_card.place, host_card)
    return as_cuda(host_card)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def images(count=7, height=32, width=32, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)


def pass_arguments(rows, cols, dtype=torch.float32, weights=False, reference=False):
    generator = torch.Generator().manual_seed(rows + cols)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(rows, cols, generator=generator).to(dtype),
        torch.randn(cols, generator=generator, dtype=torch.float64),
        2.5,
        torch.rand(rows, generator=generator) if weights else None,
        torch.randn(rows, generator=generator).to(kept) if reference else None,
        True,
        1,
    )


def check(operator, arguments):
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_importing_the_package_registers_nothing_and_loads_no_torch():
    code = (
        "import sys, sela_ext, sela_ext.kernels\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert not hasattr(torch.ops.sela, 'sinkhorn_pass')\n"
        "sela_ext.kernels.ops\n"
        "assert hasattr(torch.ops.sela, 'sinkhorn_pass')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_opcheck_of_the_pass(rows, cols):
    check(torch.ops.sela.sinkhorn_pass.default, pass_arguments(rows, cols, weights=rows % 2 == 1))


# Of torch itself, where the inputs require gradients and no output does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_of_the_pass_in_other_types(dtype):
    arguments = pass_arguments(33, 7, dtype, weights=True, reference=True)
    check(torch.ops.sela.sinkhorn_pass.default, arguments)
    strided = (arguments[0].t().contiguous().t(), arguments[1].requires_grad_(), *arguments[2:5], False, 1)
    check(torch.ops.sela.sinkhorn_pass.default, strided)


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_stored_logits(rows, cols, kind):
    logits, threads = pass_arguments(rows, cols)[0], 1
    check(torch.ops.sela.store_logits.default, (logits, kind, 2.5, threads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_of_stored_logits_of_other_types_and_strides(dtype):
    logits = pass_arguments(33, 14, dtype)[0]
    for view in (logits, logits[::2, 1:], logits[:, ::2], logits.t()):
        check(torch.ops.sela.store_logits.default, (view,))


@pytest.mark.parametrize(("count", "channels", "size"), [(0, 3, 32), (1, 1, 31), (33, 3, 8)])
def test_opcheck_of_augmentation(count, channels, size):
    index = torch.arange(count) % 7
    for augment, dtype, last in (
        (Augment.cifar(size), None, False),
        (Augment.aug_plus_more(size), torch.bfloat16, True),
        (Augment.deepcluster(size), torch.float16, False),
        (Augment.none(size), torch.uint8, False),
    ):
        arguments = (images(7, 20, 31, channels), index, augment.text, -3, 5, 255, dtype, last, 1)
        check(torch.ops.sela.augment_resident.default, arguments)


@pytest.mark.parametrize(
    ("count", "width", "dtype"), [(0, 3, torch.float32), (1, 1, torch.float16), (33, 31, torch.float64)]
)
def test_opcheck_of_vector_rows(count, width, dtype):
    rows, index = torch.randn(9, width).to(dtype), torch.arange(count) % 9
    plain = (rows, index, None, None, 0.0, 0, 0, None, 0, 1)
    noisy = (rows, index, torch.zeros(width), torch.ones(width), 0.25, -1, 7, index + 2**39, 3, 1)
    for arguments in (plain, noisy):
        check(torch.ops.sela.vector_rows.default, arguments)


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pass_gives_the_sums_of_the_kernel(rows, cols, dtype):
    logits, potential, scale, weights, reference, _, threads = pass_arguments(rows, cols, dtype, True, True)
    if rows > 20:
        logits[3, cols - 1] = torch.nan
    found = ops.sinkhorn_pass(
        logits, potential, scale=scale, row_weights=weights, reference=reference, want_labels=True, threads=threads
    )
    wanted = kernels.sinkhorn_pass(
        logits, potential, scale=scale, row_weights=weights, reference=reference, want_labels=True
    )
    for name in ("column_sums", "lse", "labels"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True)
    for name in ("objective", "weight", "masked"):
        assert getattr(found, name).shape == ()
        assert getattr(found, name).item() == getattr(wanted, name)
    assert ops.sinkhorn_pass(logits, potential).labels.shape == (0,)


def hard_logits(rows, cols):
    """With entries that saturate, an impossible one and a masked row, where there is room for them."""
    logits = pass_arguments(rows, cols)[0] * 30
    if rows > 20:
        logits[3, cols - 1], logits[5, 0], logits[7, 0], logits[9] = torch.nan, -torch.inf, -1e5, -torch.inf
    return logits


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_stored_tensors_are_what_the_kernel_stores(rows, cols, kind):
    logits = hard_logits(rows, cols)
    found, wanted = ops.store_logits(logits, kind, lam=2.5), kernels.store_logits(logits, kind, lam=2.5)
    assert (found.values.dtype, found.saturated.shape) == (tensor_type(kind), ())
    again = ops.stored_logits(found, lam=2.5)
    assert (again.kind, again.lam, again.saturated) == (kind, 2.5, wanted.saturated)
    assert again.values.dtype == wanted.values.dtype
    np.testing.assert_array_equal(again.values.view(np.uint16), wanted.values.view(np.uint16))
    np.testing.assert_array_equal(again.maxima, wanted.maxima)
    if rows > 20 and cols > 1 and kind != "bfloat16":
        assert wanted.saturated > 0


def test_a_pass_takes_stored_tensors():
    logits = pass_arguments(129, 31)[0]
    stored = ops.stored_logits(ops.store_logits(logits, lam=10.0), lam=10.0)
    found = kernels.sinkhorn_pass(stored, torch.zeros(31), scale=10.0)
    wanted = kernels.sinkhorn_pass(kernels.store_logits(logits, lam=10.0), torch.zeros(31), scale=10.0)
    np.testing.assert_array_equal(found.column_sums, wanted.column_sums)


def test_stored_logits_takes_no_other_tensors():
    stored = ops.store_logits(torch.zeros(3, 2))
    with pytest.raises(OptionError, match=r"values: expected int16, float16 or bfloat16 .* found torch\.float32"):
        ops.stored_logits(stored._replace(values=torch.zeros(3, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_function_stores_logits_for_every_number_of_rows_and_lambda(kind):
    def step(features, weight, lam):
        return ops.store_logits(features @ weight.t() * 2, kind, lam=lam)

    function, weight = compiled(step), torch.randn(31, 5, requires_grad=True)
    torch._dynamo.utils.counters.clear()
    for rows, lam in ((33, 10.0), (1001, 10.0), (31, 10.0), (129, 2.5)):
        features = torch.randn(rows, 5)
        for found, wanted in zip(function(features, weight, lam), step(features, weight, lam), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            assert not found.requires_grad
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    )  # two for numbers of rows, one for another lambda


def test_a_compiled_function_with_a_pass_serves_every_number_of_rows():
    def step(logits, potential):
        sums = ops.sinkhorn_pass(logits * 2, potential, want_labels=True)
        return potential - sums.column_sums.log(), sums.objective / sums.weight, sums.lse, sums.labels

    torch._dynamo.utils.counters.clear()
    function = compiled(step)
    for rows in (33, 1001, 31, 129):
        logits, potential = torch.randn(rows, 31), torch.randn(31, dtype=torch.float64)
        for found, wanted in zip(function(logits, potential), step(logits, potential), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for 33 rows, one for any number


def test_a_compiled_step_augments_and_trains():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    data = images()

    def step(index, augment, epoch):
        return network(kernels.augment_resident(data, index, augment, seed=2**64 - 3, epoch=epoch)).square().mean()

    function = compiled(step)
    for epoch, augment in enumerate(
        (Augment.cifar(32), Augment.cifar(32, hue=(0.1, np.float64(0.2))), Augment.none(9))
    ):
        for count in (5, 3):
            index = torch.arange(count) * 2 % 7
            found, wanted = function(index, augment, epoch), step(index, augment, epoch)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            found.backward()
    assert all(bool((p.grad != 0).any()) for p in network.parameters())


def test_a_compiled_function_augments_by_a_list_of_numbers():
    data = images()
    function = compiled(lambda x: kernels.augment_resident(x, [4, 0, 4], Augment.sela(8), seed=1, epoch=2) + 1)
    wanted = kernels.augment_resident(data, [4, 0, 4], Augment.sela(8), seed=1, epoch=2) + 1
    torch.testing.assert_close(function(data), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_reaches_the_kernels(seed):
    data, index = images(), torch.tensor([1, 6])
    found = ops.augment_resident(data, index, Augment.sela(8), seed=seed, epoch=0)
    wanted = kernels.augment_resident(data, index, Augment.sela(8), seed=seed, epoch=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    rows, noise = torch.randn(9, 5), torch.ones(5)
    found, finite = compiled(ops.vector_rows)(rows, index, rows.mean(0), noise, 0.5, seed=seed, epoch=1)
    view = VectorView(rows.mean(0).numpy(), noise.numpy(), 0.5)
    wanted, _ = kernels.vector_rows(rows.numpy(), index.numpy(), view, seed=seed, epoch=1)
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert finite.tolist() == [True, True]


def test_the_text_of_an_augmentation_is_its_fields():
    for augment in (
        Augment.sela(8),
        Augment.eval(224),
        *Augment.multi_crop(),
        Augment.none(31, brightness=np.float32(0.5)),
    ):
        again = ops._augment_of(augment.text)
        assert again.text == augment.text
        drawn = [kernels.sample_parameters(a, 40, 50, [7], seed=1, epoch=0) for a in (augment, again)]
        assert drawn[0] == drawn[1]


def test_outputs_have_no_gradient_and_say_so():
    logits, potential = torch.randn(5, 3, requires_grad=True), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sums = ops.sinkhorn_pass(logits, potential)
    assert not any(value.requires_grad for value in sums)
    function = compiled(lambda x, p: (x * ops.sinkhorn_pass(x, p).lse[:, None]).sum())
    function(logits, potential).backward()
    torch.testing.assert_close(logits.grad, sums.lse[:, None].expand(5, 3))
    assert potential.grad is None
    assert not ops.vector_rows(torch.randn(4, 3, requires_grad=True), torch.tensor([1]))[0].requires_grad


def test_fake_results_lie_on_the_device_of_the_arguments():
    with FakeTensorMode():
        logits, potential = torch.empty(33, 7, device="cuda:1"), torch.empty(7, device="cuda:1")
        for value in ops.sinkhorn_pass(logits, potential):
            assert value.device == logits.device
        for cols, stride in ((1, 8), (7, 8), (8, 8), (9, 16)):
            for kind in KINDS:
                stored = ops.store_logits(torch.empty(33, cols, device="cuda:1"), kind)
                assert {value.device for value in stored} == {logits.device}
                assert stored.values.stride() == (stride, 1)
        data, index = torch.empty(9, 32, 32, 3, dtype=torch.uint8, device="cuda:1"), torch.empty(5, dtype=torch.int64)
        for numbers in (index, index.to("cuda:1")):
            batch = ops.augment_resident(data, numbers, Augment.cifar(8), seed=0, epoch=0, channels_last=True)
            assert (batch.device, batch.shape, batch.stride(1)) == (data.device, (5, 3, 8, 8), 1)


def test_tensors_on_several_devices_are_refused():
    with FakeTensorMode():
        logits = torch.empty(33, 7, device="cuda:0")
        with pytest.raises(OptionError, match="potential: expected a tensor on cuda:0 as logits, found cpu; move it"):
            ops.sinkhorn_pass(logits, torch.empty(7))
        with pytest.raises(OptionError, match="row_weights: expected a tensor on cuda:0 as logits, found cuda:1"):
            ops.sinkhorn_pass(logits, logits[0], row_weights=torch.empty(33, device="cuda:1"))
        data = torch.empty(9, 8, 8, 3, dtype=torch.uint8)
        with pytest.raises(OptionError, match="index: expected a tensor on cpu as images, found cuda:0"):
            ops.augment_resident(data, logits[0].long(), Augment.none(8), seed=0, epoch=0)
        with pytest.raises(OptionError, match="rows: expected a tensor on cpu, found cuda:0"):
            ops.vector_rows(logits, torch.empty(3, dtype=torch.int64))
    # Real tensors take another way through torch.
    with pytest.raises(OptionError, match="row_weights: expected a tensor on cpu as logits, found meta"):
        ops._pass(torch.zeros(3, 2), torch.zeros(2), row_weights=torch.zeros(3, device="meta"))


LOGITS, INDEX = torch.zeros(5, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sinkhorn_pass(LOGITS.int(), torch.zeros(3)), DataError, "logits: expected float32"),
        (lambda: ops.sinkhorn_pass(LOGITS[0], torch.zeros(3)), DataError, r"expected a numpy or torch array \[N, K\]"),
        (lambda: ops.sinkhorn_pass(LOGITS[:, :0], torch.zeros(0)), DataError, "expected at least one column"),
        (lambda: ops.sinkhorn_pass(LOGITS, torch.zeros(2)), OptionError, "potential: expected shape"),
        (
            lambda: ops.sinkhorn_pass(LOGITS, torch.zeros(3), row_weights=torch.ones(4)),
            OptionError,
            "row_weights: expec",
        ),
        (lambda: ops.sinkhorn_pass(LOGITS, torch.zeros(3), scale=-1.0), OptionError, "scale: expected a finite number"),
        (lambda: ops.store_logits(LOGITS.int()), DataError, "logits: expected float32"),
        (lambda: ops.store_logits(LOGITS[0]), DataError, r"expected a numpy or torch array \[N, K\]"),
        (lambda: ops.store_logits(LOGITS[:, :0]), DataError, "expected at least one column"),
        (lambda: ops.store_logits(LOGITS, "int8"), OptionError, "kind: expected one of fixed16"),
        (lambda: ops.store_logits(LOGITS, lam=0.0), OptionError, "lam: expected a number"),
        (lambda: ops.store_logits(LOGITS, threads=-1), OptionError, "threads: expected an integer"),
        (lambda: ops.augment_resident(LOGITS, INDEX, Augment.none(8), seed=0, epoch=0), DataError, "images: expected"),
        (
            lambda: ops.augment_resident(images(), INDEX + 6, Augment.none(8), seed=0, epoch=0),
            DataError,
            "index: expec",
        ),
        (
            lambda: ops.augment_resident(images(), INDEX, Augment.none(8), seed=-1, epoch=0),
            OptionError,
            "seed: expecte",
        ),
        (
            lambda: ops.augment_resident(images(), INDEX, Augment.none(8), seed=0, epoch=0, dtype=torch.float64),
            OptionError,
            "dtype: expected",
        ),
        (lambda: ops.vector_rows(LOGITS.t(), INDEX), OptionError, "rows: expected C order"),
        (lambda: ops.vector_rows(LOGITS, INDEX + 4), OptionError, r"index: expected row numbers in 0 \.\. 4"),
        (lambda: ops.vector_rows(LOGITS, INDEX, torch.zeros(2)), OptionError, "mean: expected shape"),
        (
            lambda: ops.vector_rows(LOGITS, INDEX, None, torch.ones(3)),
            OptionError,
            "mean: expected a tensor with noise",
        ),
        (lambda: ops.vector_rows(LOGITS.bfloat16(), INDEX), OptionError, r"rows: expected \[N, D\] of float16"),
        (lambda: ops.vector_rows(LOGITS, LOGITS[0]), OptionError, "index: expected int64"),
        (lambda: ops._augment_of("nonsense"), OptionError, "augment: expected the text of an Augment"),
    ],
)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((5, 3), (2,)), "potential: expected shape"), (((5,), (5,)), "logits: expected"), (((5, 0), (0,)), "K = 0")],
)
def test_wrong_shapes_are_refused_while_compiling(shapes, message):
    function = compiled(lambda x, p: ops.sinkhorn_pass(x, p).lse)
    with pytest.raises(Exception, match=message):
        function(*(torch.zeros(shape) for shape in shapes))


def test_the_operators_reach_the_kernels_of_a_card(card):
    arguments = pass_arguments(33, 31, weights=True)
    data, index = images(), torch.tensor([6, 0, 6])

    def step(logits, potential, weights, x):
        sums = ops.sinkhorn_pass(logits, potential, row_weights=weights)
        return *sums, kernels.augment_resident(x, index, Augment.cifar(31), seed=0, epoch=1)

    given = arguments[0], arguments[1], arguments[3], data
    found = compiled(step)(*given)
    assert card.core.calls == 2
    for one, other in zip(found, step(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert card.core.calls == 4


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 7), (31, 8), (9, 1001)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_stores_what_the_processor_does(as_cuda, host_card, rows, cols, kind):
    logits = hard_logits(rows, cols)
    wanted = kernels.store_logits(logits, kind, lam=2.5)
    card = as_cuda(host_card)
    device._usable[card.place] = card
    card.capturing = True  # nothing is read back: a graph may be in the making
    check(torch.ops.sela.store_logits.default, (logits.nan_to_num(neginf=-1e5), kind, 2.5))
    calls = card.core.calls
    for one in (ops.store_logits, compiled(ops.store_logits)):
        found = ops.stored_logits(one(logits, kind, lam=2.5), lam=2.5)
        assert found.values.stride() == (-(-cols // 8) * 8, 1)
        np.testing.assert_array_equal(bits_of(found.values).view(np.uint16), wanted.values.view(np.uint16))
        np.testing.assert_array_equal(found.maxima.numpy(), wanted.maxima)
        assert found.saturated == wanted.saturated
    assert card.core.calls == calls + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_card_has_the_processor_store_and_no_graph_made(as_cuda, host_card, monkeypatch, kind):
    logits = hard_logits(33, 7)
    wanted = kernels.store_logits(logits, kind, lam=2.5)
    card = as_cuda(host_card)
    device._usable[card.place] = None
    check(torch.ops.sela.store_logits.default, (logits.nan_to_num(neginf=-1e5), kind, 2.5))
    found = ops.stored_logits(ops.store_logits(logits, kind, lam=2.5), lam=2.5)
    assert card.core.calls == 0
    np.testing.assert_array_equal(bits_of(found.values).view(np.uint16), wanted.values.view(np.uint16))
    np.testing.assert_array_equal(found.maxima.numpy(), wanted.maxima)
    assert found.saturated == wanted.saturated

    def capturing(what):
        raise ResourceError(f"{what}: expected a stream that is not being captured")

    monkeypatch.setattr(card, "refuse_capture", capturing)
    with pytest.raises(ResourceError, match="store_logits: expected a stream that is not being captured"):
        ops.store_logits(logits, kind)


def test_opcheck_on_a_card(card):
    check(torch.ops.sela.sinkhorn_pass.default, pass_arguments(33, 31, weights=True, reference=True))
    arguments = (images(), torch.tensor([6, 0]), Augment.cifar(31).text, 0, 1, 0, torch.float16, True)
    check(torch.ops.sela.augment_resident.default, arguments)


def test_what_a_card_cannot_do_is_said_through_the_operators(card, monkeypatch):
    logits, potential, data = torch.zeros(5, 3), torch.zeros(3), images()

    def augmented(images, augment):
        return ops.augment_resident(images, torch.tensor([0]), augment, seed=0, epoch=0)

    with pytest.raises(DataError, match="images: expected contiguous memory"):
        augmented(data[:, ::2], Augment.none(8))
    assert augmented(data, Augment.deepcluster(8)).shape == (1, 2, 8, 8)  # effects and gradients it can

    def broken(*arguments):
        raise RuntimeError("sinkhorn_pass: launch failed: out of resources")

    with monkeypatch.context() as patch:
        patch.setattr(card.core, "sinkhorn_pass_cuda", broken)
        with pytest.raises(ResourceError, match="launch failed: out of resources"):
            ops.sinkhorn_pass(logits, potential)
        with pytest.raises(ResourceError, match="launch failed: out of resources"):
            compiled(lambda x, p: ops.sinkhorn_pass(x, p).lse)(logits, potential)

    def capturing(what):
        raise ResourceError(f"{what}: expected a stream that is not being captured")

    with monkeypatch.context() as patch:
        patch.setattr(card, "refuse_capture", capturing)
        with pytest.raises(ResourceError, match="sinkhorn_pass: expected a stream that is not being captured"):
            ops.sinkhorn_pass(logits, potential)

    @contextlib.contextmanager
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(card, "current", full)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            compiled(lambda x, p: ops.sinkhorn_pass(x, p).lse)(logits, potential)


def test_operators_that_read_back_on_the_host_stay_out_of_cuda_graphs():
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    if unsafe is None:
        pytest.skip("this version of torch knows no such tag")
    for name in ("sinkhorn_pass", "augment_resident", "vector_rows", "store_logits"):
        assert unsafe in getattr(torch.ops.sela, name).default.tags


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_opcheck_and_compilation_on_a_device():
    arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in pass_arguments(1001, 33, weights=True)]
    check(torch.ops.sela.sinkhorn_pass.default, tuple(arguments))
    data, index = images().cuda(), torch.tensor([6, 0, 6])

    def step(logits, potential, x, chosen):
        sums = ops.sinkhorn_pass(logits, potential)
        return sums.column_sums, kernels.augment_resident(x, chosen, Augment.cifar(31), seed=0, epoch=1)

    for chosen in (index, index.cuda()):
        given = arguments[0], arguments[1], data, chosen
        for mode in ("default", "reduce-overhead"):
            for found, wanted in zip(torch.compile(step, fullgraph=True, mode=mode)(*given), step(*given), strict=True):
                torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_stored_logits_on_a_device_in_a_graph_and_out(kind):
    logits = hard_logits(33, 7)
    wanted, there = kernels.store_logits(logits, kind, lam=2.5), logits.cuda()
    check(torch.ops.sela.store_logits.default, (there.nan_to_num(neginf=-1e5), kind, 2.5))
    function = torch.compile(ops.store_logits, fullgraph=True, mode="reduce-overhead")
    results = [ops.store_logits(there, kind, lam=2.5), function(there, kind, lam=2.5)]
    graph, read = torch.cuda.CUDAGraph(), torch.zeros_like(there)
    with torch.cuda.graph(graph):
        results.append(ops.store_logits(read, kind, lam=2.5))
    read.copy_(there)
    graph.replay()
    for result in results:
        found = ops.stored_logits(result, lam=2.5)
        np.testing.assert_array_equal(bits_of(found.values).view(np.uint16), wanted.values.view(np.uint16))
        np.testing.assert_array_equal(found.maxima.cpu().numpy(), wanted.maxima)
        assert found.saturated == wanted.saturated
