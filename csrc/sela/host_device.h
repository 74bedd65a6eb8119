#pragma once

/// Marks arithmetic that CPU and GPU code share, so that both give the same bits.
#ifdef __CUDACC__
#define SELA_HOST_DEVICE __host__ __device__
#else
#define SELA_HOST_DEVICE
#endif

/// The same for code that the loop bodies of several instruction sets use: it must never become a function of its own,
/// since the linker would keep one copy for all of them, perhaps the one with the widest instructions.
#define SELA_SHARED_INLINE SELA_HOST_DEVICE inline __attribute__((always_inline))
