"""Writes small data sets in the layouts of the real ones, byte for byte as far as a reader can tell.

Used by the tests of the readers, and by the test that trains on every source. Images are 32 x 32 noise with a bright
quadrant by class, so that the layouts (planes, columns first, labels from 1) can be told apart.
"""

import gzip
import io
import json
import struct
import tarfile

import numpy as np
from PIL import Image

COUNT = 24
CLASSES = 4


def pictures(count=COUNT, size=32, channels=3, seed=0):
    """uint8 [count, size, size, channels] and labels [count]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 100, (count, size, size, channels), dtype=np.uint8)
    half = size // 2
    for i, label in enumerate(labels):
        y, x = divmod(int(label), 2)
        images[i, y * half : (y + 1) * half, x * half : (x + 1) * half] += 150
    return images, labels


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def python2_pickle(values):
    """A dict as Python 2's cPickle writes it with protocol 2: text as byte strings, arrays by numpy's _reconstruct."""
    out = bytearray(b"\x80\x02}q\x01(")
    memo = iter(range(2, 1 << 20))

    def put():
        out.extend(b"r" + struct.pack("<I", next(memo)))

    def text(value):
        if len(value) < 256:
            out.extend(b"U" + bytes([len(value)]) + value)
        else:
            out.extend(b"T" + struct.pack("<i", len(value)) + value)
        put()

    def write(value):
        if isinstance(value, bytes):
            text(value)
        elif isinstance(value, int):
            out.extend(b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value))
        elif isinstance(value, list):
            out.extend(b"]")
            put()
            out.extend(b"(")
            for item in value:
                write(item)
            out.extend(b"e")
        else:
            out.extend(b"cnumpy.core.multiarray\n_reconstruct\n")
            put()
            out.extend(b"cnumpy\nndarray\n")
            put()
            out.extend(b"K\x00\x85")
            put()
            text(b"b")
            out.extend(b"\x87")
            put()
            out.extend(b"R")
            put()
            out.extend(b"(K\x01")
            for side in value.shape:
                write(int(side))
            out.extend(b"\x86" if value.ndim == 2 else b"\x85")
            put()
            out.extend(b"cnumpy\ndtype\n")
            put()
            text(b"u1")
            out.extend(b"K\x00K\x01\x87")
            put()
            out.extend(b"R")
            put()
            out.extend(b"(K\x03")
            text(b"|")
            out.extend(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t")
            put()
            out.extend(b"b\x89")
            text(value.tobytes())
            out.extend(b"t")
            put()
            out.extend(b"b")

    for key, value in values.items():
        text(key)
        write(value)
    out.extend(b"u.")
    return bytes(out)


def planes(images):
    """[n, 3072] as CIFAR has them: red, green, blue, each row by row."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def cifar_files(name, per_file=6):
    """{file name: bytes} of "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python" or "cifar-100-binary"."""
    ten = name.startswith("cifar-10-")
    suffix = ".bin" if name.endswith(("bin", "binary")) else ""
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    names = [b"class %d" % i for i in range(10 if ten else 100)]
    files = {}
    for number, part in enumerate(parts):
        images, labels = pictures(per_file if ten or part == "test" else COUNT, seed=number)
        rows, listed = planes(images), labels.tolist()
        if suffix and ten:
            files[part + suffix] = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1).tobytes()
        elif suffix:
            both = np.stack([labels // 2, labels], axis=1).astype(np.uint8)
            files[part + suffix] = np.concatenate([both, rows], axis=1).tobytes()
        else:
            keys = {b"labels": listed} if ten else {b"fine_labels": listed, b"coarse_labels": [i // 2 for i in listed]}
            file_names = [b"picture_%05d.png" % i for i in range(len(rows))]
            files[part] = python2_pickle({b"batch_label": b"batch", **keys, b"data": rows, b"filenames": file_names})
    if suffix:
        files["batches.meta.txt" if ten else "fine_label_names.txt"] = b"\n".join(names) + b"\n\n"
    elif ten:
        files["batches.meta"] = python2_pickle({b"num_cases_per_batch": 10000, b"label_names": names, b"num_vis": 3072})
    else:
        coarse = [b"group %d" % i for i in range(20)]
        files["meta"] = python2_pickle({b"fine_label_names": names, b"coarse_label_names": coarse})
    return files


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path, folder, files, mode="w:gz"):
    """A folder of files as the archive that is downloaded."""
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, data in files.items():
            add(archive, f"{folder}/{name}", data)
    return path


# --- STL-10, SVHN, MNIST ----------------------------------------------------------------------------------------------


def columns_first(images):
    """[n, 3, columns, rows] as STL-10 has them."""
    return np.ascontiguousarray(images.transpose(0, 3, 2, 1))


def write_stl10(folder, train=COUNT, unlabeled=8, test=6):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate({"train": train, "unlabeled": unlabeled, "test": test}.items()):
        images, labels = pictures(count, 96, seed=number)
        (folder / f"{name}_X.bin").write_bytes(columns_first(images).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    return folder


def mat_element(kind, data, order="<"):
    """One element of a MATLAB file, short ones within the tag as MATLAB writes them."""
    if len(data) <= 4:
        first = len(data) << 16 | kind
        return struct.pack(order + "I", first) + data.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_matrix(name, array, order="<", kind=2, values=None):
    flags = struct.pack(order + "II", 9, 0)
    shape = struct.pack(f"{order}{array.ndim}i", *array.shape)
    body = mat_element(6, flags, order) + mat_element(5, shape, order) + mat_element(1, name.encode(), order)
    data = array.tobytes(order="F") if values is None else values
    body += struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)
    return struct.pack(order + "II", 14, len(body)) + body


def mat_file(*matrices, compress=True, order="<"):
    import zlib

    head = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8)
    head += struct.pack(order + "H", 0x0100) + (b"IM" if order == "<" else b"MI")
    parts = []
    for matrix in matrices:
        packed = zlib.compress(matrix)
        parts.append(struct.pack(order + "II", 15, len(packed)) + packed if compress else matrix)
    return head + b"".join(parts)


def write_svhn(folder, train=COUNT, test=6, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate({"train": train, "test": test}.items()):
        images, labels = pictures(count, seed=number)
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        order = options.get("order", "<")
        data = mat_file(mat_matrix("X", images.transpose(1, 2, 3, 0), order), mat_matrix("y", digits, order), **options)
        (folder / f"{name}_32x32.mat").write_bytes(data)
    return folder


def idx_bytes(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate({"train": COUNT, "t10k": 6}.items()):
        images, labels = pictures(count, 28, 1, seed=number)
        for file, values in ((f"{name}-images-idx3-ubyte", images[..., 0]), (f"{name}-labels-idx1-ubyte", labels)):
            data = idx_bytes(values.astype(np.uint8))
            (folder / (file + suffix)).write_bytes(gzip.compress(data, 1) if suffix else data)
    return folder


# --- image files, tar archives, tables --------------------------------------------------------------------------------


def add(archive, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def tar_bytes(members, **options):
    """A tar archive of {name: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return file.getvalue()


def samples(count=COUNT, seed=0, start=0, kind="JPEG"):
    """Members of a WebDataset shard: an image and its label each."""
    images, labels = pictures(count, seed=seed)
    members = {}
    for i in range(count):
        members[f"{start + i:06d}.{'jpg' if kind == 'JPEG' else kind.lower()}"] = encode(images[i], kind)
        members[f"{start + i:06d}.cls"] = str(labels[i]).encode()
    return members


def write_shards(folder, words=("train", "train", "test")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, word in enumerate(words):
        data = tar_bytes(samples(COUNT // 2, number, 1000 * number), format=tarfile.PAX_FORMAT)
        (folder / f"{word}-{number:03d}.tar").write_bytes(data)
    return folder


def write_images(folder, count=COUNT, nested=False, kind="PNG"):
    """Image files, in class folders a, b, c, d if `nested`; the names relative to the folder, and the labels."""
    images, labels = pictures(count)
    names = []
    for i in range(count):
        name = f"{'abcd'[labels[i]]}/{i:03d}.png" if nested else f"{i:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(images[i], kind))
        names.append(name)
    return names, labels


def write_table(path, delimiter=",", header=("path", "label")):
    names, labels = write_images(path.parent / "pictures")
    lines = [delimiter.join(header)]
    lines += [f"pictures/{name}{delimiter}{'abcd'[label]}" for name, label in zip(names, labels, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path, count=COUNT, seed=0):
    """A parquet file as the Hugging Face hub has them; needs pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = pictures(count, seed=seed)
    column = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table(
        {
            "img": pa.array(column, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": pa.array(labels, pa.int64()),
        }
    )
    features = {"img": {"_type": "Image"}, "label": {"names": list("abcd"), "_type": "ClassLabel"}}
    info = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return path


def write_list(path):
    names, _ = write_images(path.parent)
    path.write_text("\n".join(names) + "\n")
    return path


def write_npz(path, **options):
    images, labels = pictures()
    np.savez_compressed(path, x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6], **options)
    return path


def write_npy(path):
    np.save(path, pictures()[0])
    return path


def _write(folder, name, data):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# Every kind of source that is a path: name -> function of an empty folder that writes it and returns the path.
WRITERS = {
    "folder": lambda folder: (write_images(folder / "x"), folder / "x")[1],
    "class folders": lambda folder: (write_images(folder / "x", nested=True), folder / "x")[1],
    "csv": lambda folder: write_table(folder / "table.csv"),
    "tsv": lambda folder: write_table(folder / "table.tsv", "\t"),
    "txt": lambda folder: write_list(folder / "list.txt"),
    "npy": lambda folder: write_npy(folder / "images.npy"),
    "npz": lambda folder: write_npz(folder / "images.npz"),
    "idx": lambda folder: write_idx(folder / "x"),
    "idx gz": lambda folder: write_idx(folder / "x", ".gz"),
    "cifar-10 python": lambda folder: write_files(folder / "x", cifar_files("cifar-10-batches-py")),
    "cifar-10 binary": lambda folder: write_files(folder / "x", cifar_files("cifar-10-batches-bin")),
    "cifar-100 python": lambda folder: write_files(folder / "x", cifar_files("cifar-100-python")),
    "cifar-100 binary": lambda folder: write_files(folder / "x", cifar_files("cifar-100-binary")),
    "cifar-10 archive": lambda folder: write_archive(
        folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar_files("cifar-10-batches-py")
    ),
    "cifar batch": lambda folder: _write(
        folder, "data_batch_1", cifar_files("cifar-10-batches-py", COUNT)["data_batch_1"]
    ),
    "stl-10": lambda folder: write_stl10(folder / "stl10_binary"),
    "svhn": lambda folder: write_svhn(folder / "svhn"),
    "svhn file": lambda folder: write_svhn(folder / "svhn") / "train_32x32.mat",
    "tar": lambda folder: _write(folder, "shard.tar", tar_bytes(samples())),
    "tar folder": lambda folder: write_shards(folder / "shards"),
    "tar pattern": lambda folder: write_shards(folder / "shards") / "train-{000..001}.tar",
    "parquet": lambda folder: write_parquet(folder / "train-00000-of-00001.parquet"),
}
