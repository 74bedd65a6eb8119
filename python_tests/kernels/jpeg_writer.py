"""A small JPEG encoder that writes what others do not: any sampling factors, restart intervals, codes and markers.

It aims at variety, not at speed or at pictures: `write` takes coefficients as they are to be stored. Run with the
name of a folder, it writes seeds for `nox -s fuzz` there.
"""

import heapq
import struct
import sys
from pathlib import Path

import numpy as np
from scipy.fft import dctn

ZIGZAG = np.array(sorted(range(64), key=lambda i: (i // 8 + i % 8, (i % 8 if (i // 8 + i % 8) % 2 == 0 else i // 8))))


def component_size(width, height, factor, factors):
    """(blocks down, blocks across) of a component, MCUs filled up."""
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    if len(factors) == 1:
        return -(-height // 8), -(-width // 8)
    return -(-height // (8 * down)) * factor[1], -(-width // (8 * across)) * factor[0]


def coefficients(rng, width, height, factors, quant, contrast=100.0):
    """Quantised coefficients [down, across, 64] in zigzag order, of smooth noise with edges, for each component."""
    found = []
    for factor in factors:
        down, across = component_size(width, height, factor, factors)
        y, x = np.mgrid[0 : 8 * down, 0 : 8 * across]
        wave = np.sin(x * rng.uniform(0.02, 0.7) + y * rng.uniform(0.02, 0.7) + rng.uniform(0, 6))
        edge = np.where(x * rng.normal() + y * rng.normal() > rng.normal() * 20, 1, -1)
        noise = rng.normal(size=x.shape)
        samples = np.clip(contrast * (0.6 * wave + 0.4 * edge + rng.choice([0.02, 0.3]) * noise), -128, 127)
        blocks = samples.reshape(down, 8, across, 8).swapaxes(1, 2)
        exact = dctn(blocks, axes=(2, 3), norm="ortho").reshape(down, across, 64)
        found.append(np.rint(exact[..., ZIGZAG] / quant).astype(int))
    return found


def symbols_of(block, before):
    """[(symbol, bits, number of bits)] of a block: the DC difference, then the others."""
    out = [magnitude(int(block[0]) - before, 0)]
    run = 0
    for value in block[1:]:
        if value == 0:
            run += 1
            continue
        while run > 15:
            out.append((0xF0, 0, 0))
            run -= 16
        out.append(magnitude(int(value), run))
        run = 0
    if run:
        out.append((0, 0, 0))
    return out


def magnitude(value, run):
    size = abs(value).bit_length()
    return run << 4 | size, value if value >= 0 else value + (1 << size) - 1, size


def code_for(counts):
    """(lengths' counts [16], symbols in order) of a code for these symbols; the code of ones only is left free."""
    weights = dict(counts) or {0: 1}
    while True:
        heap = [(weight, k, [symbol]) for k, (symbol, weight) in enumerate([*sorted(weights.items()), (None, 0)])]
        heapq.heapify(heap)
        length = dict.fromkeys([*weights, None], 0)
        number = len(heap)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in a[2] + b[2]:
                length[symbol] += 1
            heapq.heappush(heap, (a[0] + b[0], number, a[2] + b[2]))
            number += 1
        if max(length.values()) <= 16:
            break
        weights = {symbol: weight // 2 + 1 for symbol, weight in weights.items()}
    deepest = max(length.values())
    others = sorted((n, symbol) for symbol, n in length.items() if symbol is not None)
    if length[None] != deepest:  # the free code must be the last one
        longest = others.pop()
        others = sorted([*others, (length[None], longest[1])])
    table = [0] * 16
    for n, _ in others:
        table[n - 1] += 1
    return table, [symbol for _, symbol in others]


def codes_of(table, symbols):
    """{symbol: (code, length)}"""
    found, code, k = {}, 0, 0
    for length, count in enumerate(table, start=1):
        for _ in range(count):
            found[symbols[k]] = (code, length)
            code += 1
            k += 1
        code <<= 1
    return found


def pack(pairs):
    """Bytes of [(bits, number of bits)], filled up with ones, zeros stuffed in behind 0xFF."""
    text = "".join(format(bits, f"0{length}b") for bits, length in pairs if length)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big") if text else b""
    return data.replace(b"\xff", b"\xff\x00")


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jfif():
    return segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform):
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def exif(orientation):
    """EXIF data that hold an orientation and one other tag."""
    entries = struct.pack("<HHIHHHHIHH", 0x0100, 3, 1, 1, 0, 0x0112, 3, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))


def write(
    width,
    height,
    factors,
    blocks,
    quant,
    *,
    markers=b"",
    restart=0,
    ids=(1, 2, 3),
    frame=0xC0,
    fill=b"",
    tail=b"\xff\xd9",
    wide_quant=False,
):
    """A JPEG file.

    Args:
        width: pixels.
        height: pixels.
        factors: (h, v) of each component.
        blocks: coefficients [down, across, 64] of each component, in zigzag order.
        quant: divisors [64], of all components.
        markers: segments that come first.
        restart: MCUs per restart interval.
        ids: names of the components.
        frame: marker of the frame header.
        fill: bytes before every marker in the scan, such as further 0xFF.
        tail: what follows the scan.
        wide_quant: divisors of 16 bits.
    """
    count = len(factors)
    interleaved = [(1, 1)] if count == 1 else factors
    down, across = blocks[0].shape[0] // interleaved[0][1], blocks[0].shape[1] // interleaved[0][0]
    parts, part, before = [], [], [0] * count
    counts = [({}, {}), ({}, {})]
    for mcu in range(down * across):
        if restart and mcu and mcu % restart == 0:
            parts.append(part)
            part, before = [], [0] * count
        for c, (h, v) in enumerate(interleaved):
            for y in range(v):
                for x in range(h):
                    block = blocks[c][mcu // across * v + y, mcu % across * h + x]
                    found = symbols_of(block, before[c])
                    before[c] = int(block[0])
                    for k, (symbol, _, _) in enumerate(found):
                        table = counts[min(c, 1)][min(k, 1)]
                        table[symbol] = table.get(symbol, 0) + 1
                    part.append((min(c, 1), found))
    parts.append(part)
    tables = [[code_for(kind) for kind in pair] for pair in counts]
    codes = [[codes_of(*kind) for kind in pair] for pair in tables]
    scan = b""
    for number, part in enumerate(parts):
        if number:
            scan += fill + bytes([0xFF, 0xD0 + (number - 1) % 8])
        pairs = []
        for which, found in part:
            for k, (symbol, bits, size) in enumerate(found):
                pairs += [codes[which][min(k, 1)][symbol], (bits, size)]
        scan += pack(pairs)

    out = b"\xff\xd8" + markers
    body = struct.pack(">64H", *quant) if wide_quant else bytes(quant)
    out += segment(0xDB, bytes([16 if wide_quant else 0]) + body)
    shape = struct.pack(">BHHB", 8, height, width, count)
    out += segment(
        frame, shape + b"".join(bytes([ids[c], factors[c][0] << 4 | factors[c][1], 0]) for c in range(count))
    )
    for which in range(min(count, 2)):
        for kind in range(2):
            table, symbols = tables[which][kind]
            out += segment(0xC4, bytes([kind << 4 | which, *table, *symbols]))
    if restart:
        out += segment(0xDD, struct.pack(">H", restart))
    names = b"".join(bytes([ids[c], min(c, 1) * 0x11]) for c in range(count))
    out += segment(0xDA, bytes([count]) + names + b"\0\x3f\0")
    return out + scan + fill + tail


def picture(rng, width, height, factors, *, quality=None, **options):
    """A file of these factors with generated contents."""
    step = int(rng.integers(1, 40)) if quality is None else quality
    quant = np.clip(step + step * np.arange(64) // 16, 1, 255)
    blocks = coefficients(rng, width, height, factors, quant)
    return write(width, height, factors, blocks, quant.tolist(), **options)


def corpus():
    """Small files of many kinds: seeds of a fuzzer, each behind as many zeros as csrc/fuzz/jpeg_fuzz.h says."""
    rng = np.random.default_rng(0)
    kinds = [[(1, 1)] * 3, [(2, 1), (1, 1), (1, 1)], [(1, 2), (1, 1), (1, 1)], [(2, 2), (1, 1), (1, 1)]]
    kinds += [[(4, 1), (1, 1), (1, 1)], [(2, 2), (1, 2), (2, 1)], [(1, 1)]]
    for k in range(42):
        width, height = (int(n) for n in rng.integers(1, 80 if k % 6 == 0 else 34, 2))
        markers = [b"", jfif(), adobe(0), jfif() + adobe(1)][k % 4] + (exif(1 + k % 8) if k % 3 == 0 else b"")
        data = picture(rng, width, height, kinds[k % 7], restart=[0, 0, 1, 5][k % 4], markers=markers)
        yield f"{k:02d}.jpg", bytes(12) + data


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, content in corpus():
        (target / name).write_bytes(content)
