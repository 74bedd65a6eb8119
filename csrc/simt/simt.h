// CUDA's names for a plain C++ compiler: what kernels see instead of the CUDA headers when the SIMT runner executes
// them. Included by cuda/gpu.cuh only. half and bfloat16 are CUDA's own, whose headers have host code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/runner.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // SELA_SHARED and its kin are the way to shared memory

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = sela::simt::kWarpSize;

#define SELA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace sela::simt {

/// Values of up to 8 bytes travel between lanes as 64 bits.
template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "lanes exchange up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

/// A shuffle in groups of `width` lanes; `source` is the lane wished for (of __shfl_sync its number in the group), one
/// outside of the group gives the lane's own. Only __shfl_xor_sync reaches lanes of the groups before.
template <class T>
T shuffle(Operation operation, unsigned mask, T value, int source, int width, Place place) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0)
    fail(place, "expected a width of 1, 2, 4, 8, 16 or 32, found %d", width);
  const int first = lane() / width * width;
  if (operation == Operation::shuffle) source = first + (source & (width - 1));
  const int lowest = operation == Operation::shuffle_xor ? 0 : first;
  if (source < lowest || source >= first + width) source = lane();
  return from_bits<T>(exchange(operation, mask, to_bits(value), source, place));
}

template <class T>
T& shared(const SharedName& name) {
  static_assert(std::is_trivially_default_constructible<T>::value && std::is_trivially_destructible<T>::value,
                "nobody constructs shared memory");
  return *static_cast<T*>(shared_object(name, sizeof(T), alignof(T)));
}

template <class T>
void check_atomic(const T* address, Place place) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                    std::is_same<T, unsigned long long>::value || std::is_same<T, float>::value ||
                    std::is_same<T, double>::value,
                "CUDA has no such atomic function");
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    fail(place, "an atomic function on a misaligned address %p", static_cast<const void*>(address));
}

/// *address = change(*address) in one step, returns the old value. Relaxed: it puts nothing else in order.
template <class T, class Change>
T update(T* address, Change change, Place place) {
  check_atomic(address, place);
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <class T>
struct Plain {  // keeps a parameter out of template deduction, so that atomicAdd(float*, 1) converts as in CUDA
  using type = T;
};

}  // namespace sela::simt

// ---- Barriers, shuffles, votes.

inline void __syncthreads(SELA_HERE) {
  sela::simt::barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SELA_HERE) {
  sela::simt::exchange(sela::simt::Operation::syncwarp, mask, 0, 0, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SELA_HERE) {
  return sela::simt::shuffle(sela::simt::Operation::shuffle, mask, value, source, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SELA_HERE) {
  return sela::simt::shuffle(sela::simt::Operation::shuffle_up, mask, value,
                             sela::simt::lane() - static_cast<int>(delta & 31), width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SELA_HERE) {
  return sela::simt::shuffle(sela::simt::Operation::shuffle_down, mask, value,
                             sela::simt::lane() + static_cast<int>(delta & 31), width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SELA_HERE) {
  return sela::simt::shuffle(sela::simt::Operation::shuffle_xor, mask, value, sela::simt::lane() ^ (lane_mask & 31),
                             width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SELA_HERE) {
  return static_cast<unsigned>(
      sela::simt::exchange(sela::simt::Operation::ballot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, SELA_HERE) {
  return sela::simt::exchange(sela::simt::Operation::ballot, mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SELA_HERE) {
  return sela::simt::exchange(sela::simt::Operation::ballot, mask, predicate == 0, 0, {file, line}) == 0;
}

// ---- Atomic functions.

template <class T>
T atomicAdd(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  return sela::simt::update(address, [value](T old) { return static_cast<T>(old + value); }, {file, line});
}
template <class T>
T atomicExch(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  return sela::simt::update(address, [value](T) { return value; }, {file, line});
}
template <class T>
T atomicCAS(T* address, typename sela::simt::Plain<T>::type expected, typename sela::simt::Plain<T>::type value,
            SELA_HERE) {
  static_assert(std::is_integral<T>::value, "CUDA has no such atomic function");
  return sela::simt::update(address, [=](T old) { return old == expected ? value : old; }, {file, line});
}
template <class T>
T atomicMax(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  static_assert(std::is_integral<T>::value, "CUDA has no such atomic function");
  return sela::simt::update(address, [value](T old) { return old < value ? value : old; }, {file, line});
}
template <class T>
T atomicMin(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  static_assert(std::is_integral<T>::value, "CUDA has no such atomic function");
  return sela::simt::update(address, [value](T old) { return value < old ? value : old; }, {file, line});
}
template <class T>
T atomicOr(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  return sela::simt::update(address, [value](T old) { return old | value; }, {file, line});
}
template <class T>
T atomicAnd(T* address, typename sela::simt::Plain<T>::type value, SELA_HERE) {
  return sela::simt::update(address, [value](T old) { return old & value; }, {file, line});
}

// ---- Arithmetic that CUDA has a name for, as far as kernels use it.

using std::max;
using std::min;

inline float __saturatef(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

/// Four of the eight bytes of x (0..3) and y (4..7), chosen by the four hexadecimal digits of s.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

// ---- Shared memory and asynchronous copies, the host form of what cuda/gpu.cuh says.

#define SELA_SHARED(type, name)                                                          \
  static const ::sela::simt::SharedName name##_shared_name{#name, {__FILE__, __LINE__}}; \
  type& name = ::sela::simt::shared<type>(name##_shared_name)
#define SELA_SHARED_ARRAY(type, name, count)                                             \
  static const ::sela::simt::SharedName name##_shared_name{#name, {__FILE__, __LINE__}}; \
  type(&name)[count] = ::sela::simt::shared<type[count]>(name##_shared_name)
#define SELA_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::sela::simt::dynamic_shared())

namespace sela {

/// Until the copy has landed, its destination holds poison.
inline void copy_async16(void* shared, const void* global, SELA_HERE) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    simt::fail({file, line}, "copy_async16: expected addresses that are multiples of 16, found %p and %p", shared,
               global);
  uint16_t* to = static_cast<uint16_t*>(shared);
  for (int i = 0; i < 8; ++i) to[i] = simt::kPoison;
  simt::add_copy({shared, global}, {file, line});
}

inline void copy_async_commit() {
  simt::commit_copies();
}

template <int N>
void copy_async_wait() {
  for (simt::Copy copy; simt::next_landing(N, &copy);)
    *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
}

}  // namespace sela
