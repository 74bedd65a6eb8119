// See probes.h. A probe handles in[t] and out[t] as thread t of the grid, unless it says otherwise.
#include <stdexcept>
#include <type_traits>

#include "cuda/gpu.cuh"
#include "cuda/launch.h"
#include "simt/probes.h"

namespace sela::simt {
namespace {

__device__ __forceinline__ int thread_of_block() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ __forceinline__ int thread_of_grid() {
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  return block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread_of_block();
}

/// out: [threads, 6]: who this thread is.
template <class T>
__global__ void indices_kernel(const ProbeArguments p) {
  unsigned* out = static_cast<unsigned*>(p.out) + 6 * thread_of_grid();
  out[0] = threadIdx.x;
  out[1] = threadIdx.y;
  out[2] = threadIdx.z;
  out[3] = blockIdx.x;
  out[4] = blockIdx.y;
  out[5] = blockIdx.z;
}

/// a: 0 from lane b, 1 from b below, 2 from b above, 3 from the lane whose number differs in the bits of b; c: width.
template <class T>
__global__ void shuffle_kernel(const ProbeArguments p) {
  const int t = thread_of_grid();
  const T x = static_cast<const T*>(p.in)[t];
  T* out = static_cast<T*>(p.out);
  const unsigned all = 0xffffffffu, delta = static_cast<unsigned>(p.b);
  if (p.a == 0) out[t] = __shfl_sync(all, x, p.b, p.c);
  if (p.a == 1) out[t] = __shfl_up_sync(all, x, delta, p.c);
  if (p.a == 2) out[t] = __shfl_down_sync(all, x, delta, p.c);
  if (p.a == 3) out[t] = __shfl_xor_sync(all, x, p.b, p.c);
}

/// The lanes of mask a vote whether in[t] > 0.  out: [threads, 3]: ballot, any, all; untouched where a lane has no
/// vote.
template <class T>
__global__ void vote_kernel(const ProbeArguments p) {
  const int t = thread_of_grid();
  const unsigned mask = static_cast<unsigned>(p.a);
  const int lane = thread_of_block() % warpSize;
  if ((mask >> lane & 1) == 0) return;
  const int yes = static_cast<const int*>(p.in)[t] > 0;
  unsigned* out = static_cast<unsigned*>(p.out) + 3 * t;
  out[0] = __ballot_sync(mask, yes);
  out[1] = static_cast<unsigned>(__any_sync(mask, yes));
  out[2] = static_cast<unsigned>(__all_sync(mask, yes));
}

/// All threads change out[0] by their in[t]; a: 0 add, 1 exchange, 2 compare with b and swap, 3 max, 4 min, 5 or, 6
/// and. out[1 + t]: what the thread found.
template <class T>
__global__ void atomic_kernel(const ProbeArguments p) {
  const int t = thread_of_grid();
  T* out = static_cast<T*>(p.out);
  const T x = static_cast<const T*>(p.in)[t];
  T old = T(0);
  if (p.a == 0) old = atomicAdd(&out[0], x);
  if (p.a == 1) old = atomicExch(&out[0], x);
  if constexpr (std::is_integral<T>::value) {
    if (p.a == 2) old = atomicCAS(&out[0], static_cast<T>(p.b), x);
    if (p.a == 3) old = atomicMax(&out[0], x);
    if (p.a == 4) old = atomicMin(&out[0], x);
    if (p.a == 5) old = atomicOr(&out[0], x);
    if (p.a == 6) old = atomicAnd(&out[0], x);
  }
  out[1 + t] = old;
}

/// An atomic function on an address that is a bytes off.
template <class T>
__global__ void misaligned_atomic_kernel(const ProbeArguments p) {
  atomicAdd(reinterpret_cast<int*>(static_cast<char*>(p.out) + p.a), 1);
}

/// Each block turns its part of in around, by way of dynamic shared memory.
template <class T>
__global__ void reverse_kernel(const ProbeArguments p) {
  SELA_DYNAMIC_SHARED(T, values);
  const int t = thread_of_block(), threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  values[t] = static_cast<const T*>(p.in)[thread_of_grid()];
  __syncthreads();
  static_cast<T*>(p.out)[thread_of_grid()] = values[threads - 1 - t];
}

/// One warp copies in, [a, 32] times 16 bytes, through two buffers: the next piece is under way while one is worked on.
/// out = 2 in, as floats.
template <class T>
__global__ void pipeline_kernel(const ProbeArguments p) {
  SELA_DYNAMIC_SHARED(float4, buffers);  // [2][32]
  const float4* in = static_cast<const float4*>(p.in);
  const int t = static_cast<int>(threadIdx.x);
  copy_async16(&buffers[t], &in[t]);
  copy_async_commit();
  for (int piece = 0; piece < p.a; ++piece) {
    if (piece + 1 < p.a) copy_async16(&buffers[(piece + 1) % 2 * 32 + t], &in[(piece + 1) * 32 + t]);
    copy_async_commit();
    copy_async_wait<1>();
    const float4 x = buffers[piece % 2 * 32 + t];
    static_cast<float4*>(p.out)[piece * 32 + t] = make_float4(2 * x.x, 2 * x.y, 2 * x.z, 2 * x.w);
  }
}

/// a copies without a wait.
template <class T>
__global__ void many_copies_kernel(const ProbeArguments p) {
  SELA_DYNAMIC_SHARED(float4, buffer);
  for (int i = 0; i < p.a; ++i) copy_async16(&buffer[0], p.in);
}

/// out: [3]: shared memory that nobody wrote, static and dynamic, and a value from a lane that takes no part.
template <class T>
__global__ void poison_kernel(const ProbeArguments p) {
  SELA_SHARED(T, value);
  SELA_DYNAMIC_SHARED(T, values);
  if (threadIdx.x != 0) return;
  T* out = static_cast<T*>(p.out);
  out[0] = value;
  out[1] = values[1];
  out[2] = __shfl_sync(1u, T(1), 1);
}

/// in: float, rounded to T and back.
template <class T>
__global__ void convert_kernel(const ProbeArguments p) {
  const float x = static_cast<const float*>(p.in)[thread_of_grid()];
  static_cast<float*>(p.out)[thread_of_grid()] = static_cast<float>(static_cast<T>(x));
}

/// out: the threads of the grid in the order in which they ran; out[threads]: counts them.
template <class T>
__global__ void order_kernel(const ProbeArguments p) {
  int* out = static_cast<int*>(p.out);
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  out[atomicAdd(&out[threads], 1)] = thread_of_grid();
}

/// The halves of a warp meet among themselves, one half a times, the other b times; out: what the neighbour wrote last.
template <class T>
__global__ void halves_kernel(const ProbeArguments p) {
  SELA_SHARED_ARRAY(int, values, 32);
  const int t = static_cast<int>(threadIdx.x);
  const unsigned mask = t < 16 ? 0x0000ffffu : 0xffff0000u;
  const int rounds = t < 16 ? p.a : p.b;
  for (int round = 0; round < rounds; ++round) {
    values[t] = 100 * round + t;
    __syncwarp(mask);
    static_cast<int*>(p.out)[t] = values[t ^ 1];
    __syncwarp(mask);
  }
}

/// Objects of awkward sizes, each wholly written by one thread and read by another.
template <class T>
__global__ void objects_kernel(const ProbeArguments p) {
  struct Odd {
    char bytes[7];
  };
  SELA_SHARED(char, one);
  SELA_SHARED(double, eight);
  SELA_SHARED(Odd, seven);
  SELA_SHARED_ARRAY(unsigned short, ten, 5);
  SELA_SHARED(float4, sixteen);
  if (threadIdx.x == 0) {
    one = 1;
    eight = 8;
    for (int i = 0; i < 7; ++i) seven.bytes[i] = static_cast<char>(i);
    for (int i = 0; i < 5; ++i) ten[i] = static_cast<unsigned short>(i);
    sixteen = make_float4(1, 2, 3, 4);
  }
  __syncthreads();
  if (threadIdx.x == 1) {
    int sum = one + static_cast<int>(eight) + static_cast<int>(sixteen.x + sixteen.y + sixteen.z + sixteen.w);
    for (int i = 0; i < 7; ++i) sum += seven.bytes[i];
    for (int i = 0; i < 5; ++i) sum += ten[i];
    *static_cast<int*>(p.out) = sum;
  }
}

/// More static shared memory than a block has.
template <class T>
__global__ void too_much_static_kernel(const ProbeArguments p) {
  SELA_SHARED_ARRAY(float, first, 8 * 1024);
  SELA_SHARED_ARRAY(float, second, 4 * 1024 + 1);
  first[0] = second[0] = static_cast<float>(p.a);
}

/// 40 KB of static shared memory, beside the dynamic.
template <class T>
__global__ void much_static_kernel(const ProbeArguments p) {
  SELA_SHARED_ARRAY(float, values, 10 * 1024);
  values[threadIdx.x] = static_cast<float>(p.a);
}

using Kernel = void (*)(ProbeArguments);

template <class T>
Kernel find(const std::string& name) {
  if (name == "shuffle") return shuffle_kernel<T>;
  if (name == "reverse") return reverse_kernel<T>;
  if (name == "poison") return poison_kernel<T>;
  if (name == "convert") return convert_kernel<T>;
  if constexpr (sizeof(T) >= 4) {
    if (name == "atomic") return atomic_kernel<T>;
  }
  if constexpr (std::is_same<T, int>::value) {  // those that have one type
    if (name == "indices") return indices_kernel<T>;
    if (name == "vote") return vote_kernel<T>;
    if (name == "misaligned_atomic") return misaligned_atomic_kernel<T>;
    if (name == "pipeline") return pipeline_kernel<T>;
    if (name == "many_copies") return many_copies_kernel<T>;
    if (name == "order") return order_kernel<T>;
    if (name == "halves") return halves_kernel<T>;
    if (name == "objects") return objects_kernel<T>;
    if (name == "too_much_static") return too_much_static_kernel<T>;
    if (name == "much_static") return much_static_kernel<T>;
  }
  throw std::invalid_argument("probe: no " + name + " of this type");
}

Kernel find(const std::string& name, const std::string& type) {
  if (type == "int32") return find<int>(name);
  if (type == "uint32") return find<unsigned>(name);
  if (type == "uint64") return find<unsigned long long>(name);
  if (type == "float32") return find<float>(name);
  if (type == "float64") return find<double>(name);
  if (type == "float16") return find<__half>(name);
  if (type == "bfloat16") return find<__nv_bfloat16>(name);
  throw std::invalid_argument("probe: no type " + type);
}

}  // namespace

void run_probe(const std::string& name, const std::string& type, const ProbeArguments& arguments, dim3 grid, dim3 block,
               size_t dynamic_shared) {
  launch(name.c_str(), find(name, type), grid, block, dynamic_shared, nullptr, arguments);
}

}  // namespace sela::simt
