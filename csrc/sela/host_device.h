#pragma once

/// Marks arithmetic that CPU and GPU code share, so that both give the same bits.
#ifdef __CUDACC__
#define SELA_HOST_DEVICE __host__ __device__
#else
#define SELA_HOST_DEVICE
#endif
