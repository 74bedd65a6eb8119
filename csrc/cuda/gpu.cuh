// All that a kernel may use of CUDA, and the only thing it includes for it.  A kernel's source compiles unchanged with
// nvcc, for a device, and with a plain C++ compiler, for the SIMT runner (simt/simt.h), which checks it without a
// device.
//
// Beside CUDA's own names:
//   SELA_SHARED(type, name)               one object of static shared memory, of a trivial type
//   SELA_SHARED_ARRAY(type, name, count)  an array of it
//   SELA_DYNAMIC_SHARED(type, name)       a pointer to the dynamic shared memory, aligned to 16 bytes
//   copy_async16(shared, global)          16 bytes, both addresses multiples of 16, under way until waited for
//   copy_async_commit()                   closes a group of this thread's copies
//   copy_async_wait<N>()                  all but this thread's N latest groups have landed, for this thread to see
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SELA_SHARED(type, name) __shared__ type name
#define SELA_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define SELA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char sela_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(sela_dynamic_shared)

namespace sela {

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
#else
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  *static_cast<uint4*>(shared) = value;
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace sela
#else
#include "simt/simt.h"
#endif
