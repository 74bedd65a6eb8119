"""Images for the kernels of the augmentation, room for their outputs, and what the CPU draws for them."""

import numpy as np

from sela_ext.kernels import EFFECTS, PARAMETERS
from sela_ext.kernels.augment import effect_fields, option_fields

LIMIT = 0.01 / 255  # what is promised
GUARD = 64  # bytes around the output, which must stay as they are
PLAIN = {"mean": (0.0,), "std": (1.0,)}  # output = pixels in [0, 1]


def thin(simt, cases):
    """All the cases; every fifth under ThreadSanitizer, which takes a millisecond per thread."""
    cases = list(cases)
    return cases[::5] if simt.variant == "thread" else cases


def random_images(count, height, width, channels, seed=0):
    """Noise, blocks of few colours, ramps, gray, black, white."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images[1::6] = images[1::6] // 86 * 127
    images[2::6] = images[2::6, :1, :1] + np.arange(width, dtype=np.uint8)[:, None]
    images[3::6] = images[3::6, :, :, :1]
    images[4::6, : height // 2] = 0
    images[5::6] = 255
    return images


def make_options(simt, augment, channels):
    return simt.AugmentOptions(**option_fields(augment, channels))


def further_options(simt, augment):
    return simt.EffectOptions(**effect_fields(augment))


def cpu_parameters(simt, augment, heights, widths, index, key=(0, 0, 0)):
    index = np.ascontiguousarray(index, np.int64)
    out = np.zeros(len(index), PARAMETERS)
    sides = (np.broadcast_to(np.asarray(side, np.int32), index.shape).copy() for side in (heights, widths))
    simt.sample_parameters(make_options(simt, augment, 3), *sides, index, *key, out)
    return out


def cpu_effects(simt, augment, index, key=(0, 0, 0)):
    out = np.zeros(len(index), EFFECTS)
    if augment.draws_effects:
        simt.sample_effects(further_options(simt, augment), np.ascontiguousarray(index, np.int64), *key, out)
    else:
        out["sharpness"] = 1
    return out


def empty_output(count, channels, size, dtype, shift=0):
    """(bytes, their view as [count, channels * size * size]); GUARD + shift bytes lie before the view."""
    kind = np.float32 if dtype == "float32" else np.uint16
    length = count * channels * size * size * np.dtype(kind).itemsize
    room = np.full(length + 2 * GUARD + 32, 0xA5, np.uint8)
    begin = GUARD + (-(room.ctypes.data + GUARD)) % 16 + shift
    return room, room[begin : begin + length].view(kind).reshape(count, channels * size * size)


def untouched(room, view):
    begin = view.ctypes.data - room.ctypes.data
    return (room[:begin] == 0xA5).all() and (room[begin + view.nbytes :] == 0xA5).all()
