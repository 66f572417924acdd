// Functions that the kernels share: loads and stores of several elements, sums in a fixed order. No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace upstep {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <class T, int N> __device__ __forceinline__ void load(const T* from, float* to) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = widen(pack.at[j]);
}

template <class T, int N> __device__ __forceinline__ void store(T* to, const float* from) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.at[j] = narrow<T>(from[j]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// every lane gets the sum; the tree is fixed
template <class F> __device__ __forceinline__ F warp_sum(F x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// every thread of the block gets the sum; `slots` holds one F a warp and is free again on return
template <class F, int THREADS> __device__ __forceinline__ F block_sum(F x, F* slots) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  F total = 0;
  for (int w = 0; w < THREADS / 32; ++w) total += slots[w];
  __syncthreads();
  return total;
}

// x -> float(by * x), rounded once: by in two floats, because a conversion to double for every cell is slow
struct Multiplier {
  double by;
  float high, low;
  bool in_range;

  __device__ __forceinline__ explicit Multiplier(double by)
      : by(by), high(static_cast<float>(by)), low(static_cast<float>(by - high)), in_range(by > 1e-30 && by < 1e30) {}

  __device__ __forceinline__ float operator()(float x) const {
    return in_range ? fmaf(x, high, x * low) : static_cast<float>(x * by);
  }
};

}  // namespace upstep
