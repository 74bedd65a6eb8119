import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from sela_ext.data.pickled import read_pickle
from sela_ext.errors import DataError


class Command:
    """Pickled, this runs a shell command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_what_python2_wrote_is_read(files):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    values = {b"data": array, b"labels": [0, 300, -1], b"long": b"x" * 300, b"names": [b"a", b"b"]}
    found = read_pickle(files.python2_pickle(values), "x")
    assert found.keys() == values.keys()
    np.testing.assert_array_equal(found[b"data"], array)
    assert {key: found[key] for key in found if key != b"data"} == {
        key: values[key] for key in values if key != b"data"
    }
    # The standard library reads the same from it, so the file is what it should be.
    np.testing.assert_array_equal(pickle.loads(files.python2_pickle(values), encoding="bytes")[b"data"], array)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_python3_writes_is_read(protocol, order):
    array = np.asarray(np.arange(12, dtype=np.uint8).reshape(3, 4), order=order)
    found = read_pickle(pickle.dumps({"data": array, "labels": [1, 2]}, protocol), "x")
    np.testing.assert_array_equal(found["data"], array)
    assert found["labels"] == [1, 2]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_and_nothing_is_run(tmp_path, protocol):
    mark = tmp_path / "executed"
    data = pickle.dumps({b"data": Command(mark)}, protocol)
    with pytest.raises(DataError, match=r"batch: .*nothing was executed"):
        read_pickle(data, "batch")
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        print,
        object(),
        np.dtype("O"),
        np.array([None]),
        np.zeros(3),
        np.float64(1),
        {1},
        1.5,
        slice(3),
        range(3),
        Ellipsis,
    ],
    ids=str,
)
def test_everything_that_data_files_do_not_hold_is_refused(value):
    with pytest.raises(DataError):
        read_pickle(pickle.dumps({"data": value}, 2), "x")


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        b"\x80\x02(U\x04trueios\nsystem\n.",
        b"\x80\x02cbuiltins\neval\nU\x01\x31\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
        b"\x80\x02ccodecs\nopen\nU\x01x\x85R.",
        b"\x80\x02c__main__\nx\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02U\x01xQ.",  # a persistent identity
    ],
)
def test_hand_written_programs_are_refused(code):
    with pytest.raises(DataError):
        read_pickle(code, "x")


def array_pickle(shape, data, kind=b"u1", state=b"K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"):
    out = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
    out += b"".join(b"\x8a\x08" + struct.pack("<q", side) for side in shape) + b"t"
    out += b"cnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R(" + state + b"b\x89"
    return out + b"T" + struct.pack("<i", len(data)) + data + b"tb."


def test_an_array_is_as_large_as_its_bytes(files):
    np.testing.assert_array_equal(read_pickle(array_pickle((2, 3), b"abcdef"), "x"), [[97, 98, 99], [100, 101, 102]])
    for shape in ((1 << 40,), (1 << 20, 1 << 20), (2, 4), (-1, -6), (7,)):
        with pytest.raises(DataError):
            read_pickle(array_pickle(shape, b"abcdef"), "x")


@pytest.mark.parametrize("kind", [b"O8", b"f8", b"i8", b"V6"])
def test_an_array_of_another_type_is_refused(kind):
    with pytest.raises(DataError, match="expected arrays of uint8"):
        read_pickle(array_pickle((6,), b"abcdef", kind), "x")


def test_lying_lengths_and_memory_cells_take_no_memory():
    for data in (
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
    ):
        with pytest.raises(DataError):
            read_pickle(data, "x")


def test_inert_objects_do_not_leave_and_cannot_be_changed():
    for name in (b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"):
        for state in (b"}U\x01aK\x01sb.", b"N}U\x08__call__K\x01s\x86b."):
            with pytest.raises(DataError):
                read_pickle(b"\x80\x02" + name + state, "x")


def test_a_pickle_cut_anywhere_is_refused(files):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = files.python2_pickle({b"data": array, b"labels": [1, 2, 300]})
    for size in range(len(data)):
        with pytest.raises(DataError):
            read_pickle(data[:size], "x")
    with pytest.raises(DataError, match="behind the end"):
        read_pickle(data + b"x", "x")


def test_any_changed_byte_gives_values_or_an_error(files):
    data = bytearray(
        files.python2_pickle({b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), b"labels": [1, 2, 300]})
    )
    rng = np.random.default_rng(5)
    read = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        try:
            read_pickle(bytes(changed), "x")
            read += 1
        except DataError:
            pass
    assert 100 < read < 1400


def test_the_instructions_admitted_all_exist():
    from sela_ext.data.pickled import _CODES

    assert {code.name for code in pickletools.opcodes} >= _CODES
    assert not {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"} & _CODES
