// The headers of a JPEG file: what they must say for the decoder to take the file.
//
// Marker by marker as libjpeg reads them, but strict: whatever libjpeg would only warn of is "damaged" or
// "unsupported" here, and left to libjpeg.
#include <algorithm>
#include <cstring>

#include "cpu/jpeg_loops.h"
#include "sela/jpeg.h"

namespace sela {
namespace {

int word(const uint8_t* p) {
  return p[0] << 8 | p[1];
}

/// The body of one marker segment.
struct Segment {
  const uint8_t* at;
  const uint8_t* end;
  int64_t left() const { return end - at; }
};

bool read_quant(Segment s, JpegFile& file) {
  while (s.left() > 0) {
    const int precision = s.at[0] >> 4, number = s.at[0] & 15;
    const int bytes = precision != 0 ? 128 : 64;
    if (precision > 1 || number > 3 || s.left() < 1 + bytes) return false;
    ++s.at;
    for (int k = 0; k < 64; ++k) {
      const int value = precision != 0 ? word(s.at + 2 * k) : s.at[k];
      if (value == 0 || value > 32767) return false;
      file.quant[number][kJpegZigzag[k]] = static_cast<uint16_t>(value);
    }
    file.quant_present[number] = true;
    s.at += bytes;
  }
  return true;
}

bool read_codes(Segment s, JpegFile& file) {
  while (s.left() > 0) {
    if (s.left() < 17) return false;
    const int kind = s.at[0] >> 4, number = s.at[0] & 15;
    if (kind > 1 || number > 3) return false;
    JpegCode& code = (kind == 1 ? file.ac : file.dc)[number];
    code = JpegCode();
    std::memcpy(code.counts, s.at + 1, 16);
    s.at += 17;
    uint32_t next = 0;
    for (int length = 1; length <= 16; ++length) {
      next += code.counts[length - 1];
      if (next >= 1u << length) return false;  // a code of ones only is none to libjpeg
      next <<= 1;
      code.total += code.counts[length - 1];
    }
    if (code.total > 256 || s.left() < code.total) return false;
    std::memcpy(code.symbols, s.at, static_cast<size_t>(code.total));
    for (int k = 0; k < code.total && kind == 0; ++k)
      if (code.symbols[k] > 15) return false;
    code.present = true;
    s.at += code.total;
  }
  return true;
}

int blocks_per_mcu(const JpegFile& file) {
  int blocks = 0;
  for (int c = 0; c < file.components; ++c) blocks += file.component[c].h * file.component[c].v;
  return blocks;
}

JpegStatus read_frame(const Segment& s, JpegFile& file, int* ids) {
  if (s.left() < 6) return JpegStatus::damaged;
  if (s.at[0] != 8) return JpegStatus::unsupported;
  file.height = word(s.at + 1);
  file.width = word(s.at + 3);
  file.components = s.at[5];
  if (file.components != 1 && file.components != 3) return JpegStatus::unsupported;
  if (file.height == 0 || file.width == 0 || s.left() != 6 + 3 * file.components) return JpegStatus::damaged;
  for (int c = 0; c < file.components; ++c) {
    JpegComponent& component = file.component[c];
    const uint8_t* p = s.at + 6 + 3 * c;
    ids[c] = p[0];
    for (int other = 0; other < c; ++other)
      if (ids[other] == ids[c]) return JpegStatus::damaged;
    component.h = p[1] >> 4;
    component.v = p[1] & 15;
    component.quant = p[2];
    if (component.h < 1 || component.h > 4 || component.v < 1 || component.v > 4 || component.quant > 3)
      return JpegStatus::damaged;
    file.max_h = std::max(file.max_h, component.h);
    file.max_v = std::max(file.max_v, component.v);
  }
  if (file.components == 1) {  // a scan of one component goes block by block, whatever its factors
    file.component[0].h = file.component[0].v = file.max_h = file.max_v = 1;
  }
  for (int c = 0; c < file.components; ++c) {
    const JpegComponent& component = file.component[c];
    if (file.max_h % component.h != 0 || file.max_v % component.v != 0) return JpegStatus::unsupported;
  }
  if (blocks_per_mcu(file) > kJpegBlocks) return JpegStatus::damaged;
  file.mcus_x = (file.width + 8 * file.max_h - 1) / (8 * file.max_h);
  file.mcus_y = (file.height + 8 * file.max_v - 1) / (8 * file.max_v);
  return JpegStatus::ok;
}

JpegStatus read_scan(const Segment& s, JpegFile& file, const int* ids) {
  if (s.left() < 1 || s.at[0] != file.components) return JpegStatus::unsupported;
  if (s.left() != 4 + 2 * file.components) return JpegStatus::damaged;
  for (int c = 0; c < file.components; ++c) {
    const uint8_t* p = s.at + 1 + 2 * c;
    if (p[0] != ids[c]) return JpegStatus::unsupported;
    JpegComponent& component = file.component[c];
    component.dc = p[1] >> 4;
    component.ac = p[1] & 15;
    if (component.dc > 3 || component.ac > 3) return JpegStatus::damaged;
    if (!file.dc[component.dc].present || !file.ac[component.ac].present || !file.quant_present[component.quant])
      return JpegStatus::unsupported;
  }
  const uint8_t* p = s.at + 1 + 2 * file.components;
  return p[0] == 0 && p[1] == 63 && p[2] == 0 ? JpegStatus::ok : JpegStatus::damaged;
}

/// libjpeg's rules: JFIF means YCbCr, else Adobe's flag decides, else the components' names.
JpegColour colour_of(const JpegFile& file, bool jfif, int adobe, const int* ids) {
  if (file.components == 1) return JpegColour::grey;
  if (jfif) return JpegColour::ycc;
  if (adobe >= 0) return adobe == 0 ? JpegColour::rgb : JpegColour::ycc;
  return ids[0] == 'R' && ids[1] == 'G' && ids[2] == 'B' ? JpegColour::rgb : JpegColour::ycc;
}

}  // namespace

JpegStatus read_jpeg_header(const uint8_t* data, size_t size, JpegFile& file) {
  file = JpegFile();
  if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return JpegStatus::unsupported;
  const uint8_t* const end = data + size;
  const uint8_t* at = data + 2;
  bool jfif = false, frame = false;
  int adobe = -1, ids[kJpegComponents] = {};
  for (;;) {
    if (end - at < 4 || at[0] != 0xFF) return JpegStatus::damaged;
    while (end - at >= 4 && at[1] == 0xFF) ++at;  // fill bytes
    if (end - at < 4) return JpegStatus::damaged;
    const int marker = at[1], length = word(at + 2);
    if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9)) return JpegStatus::damaged;
    if (length < 2 || length > end - at - 2) return JpegStatus::damaged;
    const Segment body{at + 4, at + 2 + length};
    at = body.end;
    if (marker == 0xC0 || marker == 0xC1) {
      if (frame) return JpegStatus::damaged;
      const JpegStatus status = read_frame(body, file, ids);
      if (status != JpegStatus::ok) return status;
      frame = true;
    } else if (marker == 0xC4) {
      if (!read_codes(body, file)) return JpegStatus::damaged;
    } else if (marker == 0xDB) {
      if (!read_quant(body, file)) return JpegStatus::damaged;
    } else if (marker == 0xDD) {
      if (body.left() != 2) return JpegStatus::damaged;
      file.restart_interval = word(body.at);
    } else if (marker == 0xDA) {
      if (!frame) return JpegStatus::damaged;
      const JpegStatus status = read_scan(body, file, ids);
      file.colour = colour_of(file, jfif, adobe, ids);
      file.scan = at - data;
      // Every block takes two bits at least: what claims more is not worth an allocation.
      if (status == JpegStatus::ok && (end - at) * 4 < file.mcus_x * file.mcus_y * blocks_per_mcu(file))
        return JpegStatus::damaged;
      return status;
    } else if (marker == 0xE0) {
      jfif = jfif || (body.left() >= 14 && std::memcmp(body.at, "JFIF", 5) == 0);
    } else if (marker == 0xEE) {
      if (body.left() >= 12 && std::memcmp(body.at, "Adobe", 5) == 0) {
        adobe = body.at[11];
        if (adobe > 1) return JpegStatus::unsupported;
      }
    } else if (marker < 0xE0 || (marker > 0xEF && marker != 0xFE)) {
      return JpegStatus::unsupported;  // other frames, arithmetic coding, hierarchies, ...
    }
  }
}

}  // namespace sela
