#pragma once

namespace sela {

/// Number of usable CUDA devices.  0 when built without CUDA, when there is no driver and when there is no card.
int cuda_device_count();

}  // namespace sela
