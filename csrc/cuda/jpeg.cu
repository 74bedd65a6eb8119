// Launchers of the JPEG decoder: tables, coefficients, samples.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/jpeg_kernels.cuh"
#include "cuda/launch.h"
#include "sela/jpeg_batch.h"

namespace sela {
namespace {

using jpeg_cuda::Arguments;

/// As many blocks as are resident at once, never more than there is work for.
template <class Kernel>
void launch_over(const char* name, Kernel kernel, int64_t work, int threads, const Arguments& a, void* stream) {
  const int64_t at_once =
      int64_t{std::max(1, resident_blocks(name, kernel, threads, 0))} * std::max(1, multiprocessors());
  launch(name, kernel, dim3(static_cast<unsigned>(std::min(work, at_once))), threads, 0, stream, a);
}

}  // namespace

void decode_jpeg_cuda(const JpegBatchSizes& sizes, const uint8_t* upload, void* workspace, uint8_t* planes,
                      uint32_t* status, void* stream) {
  using namespace jpeg_cuda;
  if (sizes.entry_count <= 0) return;
  if (reinterpret_cast<uintptr_t>(upload) % 16 != 0 || reinterpret_cast<uintptr_t>(workspace) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(planes) % 16 != 0)
    throw std::invalid_argument("decode_jpeg: expected upload, workspace and planes at multiples of 16 bytes");
  Arguments a{};
  a.scans = upload + sizes.scans;
  a.entries = reinterpret_cast<const JpegDeviceEntry*>(upload + sizes.entries);
  a.images = reinterpret_cast<const JpegDeviceImage*>(upload + sizes.images);
  a.sets = reinterpret_cast<const JpegDeviceSet*>(upload + sizes.sets);
  a.quants = reinterpret_cast<const uint16_t*>(upload + sizes.quants);
  a.works = reinterpret_cast<const JpegDeviceWork*>(upload + sizes.works);
  a.tiles = reinterpret_cast<const JpegDeviceTile*>(upload + sizes.tiles);
  a.work_count = static_cast<uint32_t>(sizes.work_count);
  a.tile_count = static_cast<uint32_t>(sizes.tile_count);
  a.coefficients = static_cast<int16_t*>(workspace);
  a.tables = reinterpret_cast<JpegDeviceTables*>(static_cast<uint8_t*>(workspace) + sizes.coefficient_bytes);
  a.planes = planes;
  a.status = status;
  a.set_count = static_cast<uint32_t>(sizes.set_count);
  launch_over("tables_kernel", tables_kernel, sizes.set_count * kJpegSetCodes, kTablesThreads, a, stream);
  launch_over("entropy_kernel", entropy_kernel, sizes.work_count, kEntropyThreads, a, stream);
  const int64_t warps = kTransformThreads / 32;
  launch_over("transform_kernel", transform_kernel, (sizes.tile_count + warps - 1) / warps, kTransformThreads, a,
              stream);
}

}  // namespace sela
