// The center vector on the GPU: kernels on raw pointers, no torch header. Formulas: kernels/center_vector.py.
//
// forward   A team of threads (a warp for d <= 1024, else the block) takes one image at a time: all its views, each
//           element read once and kept in registers. Teams of a block add up in a fixed tree, blocks leave partial
//           sums, and the block that draws the last ticket adds those in order, so the result does not depend on
//           timing. The same block then takes the gate's decision: one launch.
// backward  One warp a row.
#pragma once

#include "device.cuh"
#include "gate.h"

namespace upstep {

constexpr int kMaxBlocks = 132;  // a constant, so that the order of additions is the same on every GPU
constexpr int kScratchFloats = 8192;

template <int THREADS, int TEAM> __device__ __forceinline__ double team_sum(double x, double* slots) {
  if constexpr (TEAM == 32) return warp_sum(x);
  else return block_sum<double, THREADS>(x, slots);
}

// what the sums of a whole batch lead to: s, |s|, the decision, the running center; called by all threads of one block
struct Finish {
  const double* state;  // null: leave the sums as they are
  Gate gate;
  float* center;   // [d]
  double* next;    // [head + d]
};

template <int THREADS>
__device__ void finish(const double* sums, int num_views, int d, const Finish& f, double* slots) {
  const double num_images = sums[num_views * d + 1], zbar_square = sums[num_views * d] / num_images;
  double square = 0, square1 = 0, square2 = 0;
  for (int c = threadIdx.x; c < d; c += THREADS) {
    const double view1 = sums[c] / num_images, view2 = num_views == 2 ? sums[d + c] / num_images : 0.0;
    const double s = (view1 + view2) / num_views;
    f.center[c] = static_cast<float>(s);
    square += s * s;
    square1 += view1 * view1;
    square2 += view2 * view2;
  }
  square = block_sum<double, THREADS>(square, slots);
  square1 = block_sum<double, THREADS>(square1, slots);
  square2 = block_sum<double, THREADS>(square2, slots);
  __shared__ double head[kHead];
  if (threadIdx.x == 0) {
    const double m = sqrt(square);
    const Magnitudes now{m, unbiased_square(m, zbar_square, num_images), sqrt(square1), sqrt(square2)};
    const int64_t word = decide(f.gate, f.state, now, head);
    for (int i = 0; i < kHead; ++i) f.next[i] = head[i];
    if (f.gate.flag) {
      __threadfence_system();
      *reinterpret_cast<volatile int64_t*>(f.gate.flag) = word;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += THREADS) {
    const double view1 = sums[c] / num_images, view2 = num_views == 2 ? sums[d + c] / num_images : 0.0;
    f.next[kHead + c] = moved_center(f.gate, f.state, head, f.state[kHead + c], (view1 + view2) / num_views);
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) finish_kernel(const double* sums, int num_views, int d, Finish f) {
  __shared__ double slots[THREADS / 32];
  finish<THREADS>(sums, num_views, d, f, slots);
}

template <class T> struct Forward {
  const T* u;          // [num_views * num_images, d]
  int64_t num_images;
  int num_views, d;
  float* z;            // as u
  double* inv_norm;    // [num_views * num_images]
  float* partial;      // [blocks, partial_stride(num_views, d)]
  unsigned* ticket;    // 0 before and after
  double* sums;        // [num_views * d + 2]
  Finish finish;
};

// sums of each view, then of |z_bar|^2, padded to whole float4
UPSTEP_HOST_DEVICE int partial_stride(int num_views, int d) { return (num_views * d + 1 + 3) / 4 * 4; }

// Adds the blocks' partial sums, in double, in a fixed order: threads split into groups of whole rows of quads.
template <int THREADS> __device__ void add_blocks(const float* partial, int blocks, int stride, int wanted,
                                                  double* sums, double* scratch) {
  const int quads = stride / 4, groups = max(1, THREADS / quads);
  const int share = (blocks + groups - 1) / groups;
  const int group = groups == 1 ? 0 : threadIdx.x / quads;
  for (int q = groups == 1 ? threadIdx.x : threadIdx.x % quads; q < quads; q += THREADS) {
    double total[4] = {0, 0, 0, 0};
    if (group < groups) {
      const int end = min(blocks, (group + 1) * share);
#pragma unroll 4
      for (int b = group * share; b < end; ++b) {
        // past L1, which may hold what the memory was before another block wrote it
        const float4 p = __ldcg(reinterpret_cast<const float4*>(partial + int64_t{b} * stride) + q);
        total[0] += p.x, total[1] += p.y, total[2] += p.z, total[3] += p.w;
      }
    }
    if (groups == 1) {
      for (int j = 0; j < 4; ++j) if (4 * q + j < wanted) sums[4 * q + j] = total[j];
    } else {
      for (int j = 0; j < 4; ++j) scratch[threadIdx.x * 4 + j] = total[j];
    }
  }
  if (groups == 1) return;
  __syncthreads();
  for (int c = threadIdx.x; c < wanted; c += THREADS) {
    double total = 0;
    for (int g = 0; g < groups; ++g) total += scratch[(g * quads + c / 4) * 4 + c % 4];
    sums[c] = total;
  }
}

template <class T, int THREADS, int TEAM, int VEC, int PACKS>
__global__ void __launch_bounds__(THREADS) forward_kernel(Forward<T> a) {
  constexpr int kTeams = THREADS / TEAM, kWidth = TEAM * VEC * PACKS, kEach = VEC * PACKS;
  static_assert(kTeams == 1 || kMaxViews * (kTeams / 2) * kWidth <= kScratchFloats);
  static_assert(THREADS * 4 * 2 <= kScratchFloats);
  __shared__ alignas(16) float scratch[kScratchFloats];
  __shared__ double slots[THREADS / 32];
  __shared__ bool is_last;
  const int team = threadIdx.x / TEAM, rank = threadIdx.x % TEAM;
  float* float_slots = reinterpret_cast<float*>(slots);

  float acc[kMaxViews][kEach] = {};
  float zbar_square = 0;
  for (int64_t image = int64_t{blockIdx.x} * kTeams + team; image < a.num_images;
       image += int64_t{gridDim.x} * kTeams) {
    float x[kMaxViews][kEach] = {};  // u, then z; a view that is not there stays 0
#pragma unroll
    for (int v = 0; v < kMaxViews; ++v) {
      if (v < a.num_views) {
        const T* row = a.u + (v * a.num_images + image) * a.d;
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
          const int c = (p * TEAM + rank) * VEC;
          if (c < a.d) load<T, VEC>(row + c, x[v] + p * VEC);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kMaxViews; ++v) {
      if (v < a.num_views) {
        // in double: no square leaves the range, and a row's cells do not share a rounding error
        double square = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) square = fma(double{x[v][i]}, double{x[v][i]}, square);
        const double inv = inverse_norm(team_sum<THREADS, TEAM>(square, slots));
        const Multiplier by(inv);
        float* row = a.z + (v * a.num_images + image) * a.d;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[v][i] = by(x[v][i]);
          acc[v][i] += x[v][i];
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
          const int c = (p * TEAM + rank) * VEC;
          if (c < a.d) store<float, VEC>(row + c, x[v] + p * VEC);
        }
        if (rank == 0) a.inv_norm[v * a.num_images + image] = inv;
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) zbar_square = fmaf(x[0][i] + x[1][i], x[0][i] + x[1][i], zbar_square);
  }

  // teams of the block: halves add up, in a tree
  for (int half = kTeams / 2; half >= 1; half /= 2) {
    if (team >= half && team < 2 * half)
#pragma unroll
      for (int v = 0; v < kMaxViews; ++v)
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          scratch[((v * half + team - half) * kEach + i) * TEAM + rank] = acc[v][i];
    __syncthreads();
    if (team < half)
#pragma unroll
      for (int v = 0; v < kMaxViews; ++v)
#pragma unroll
        for (int i = 0; i < kEach; ++i) acc[v][i] += scratch[((v * half + team) * kEach + i) * TEAM + rank];
    __syncthreads();
  }
  zbar_square = block_sum<float, THREADS>(zbar_square, float_slots);

  const int stride = partial_stride(a.num_views, a.d);
  float* mine = a.partial + int64_t{blockIdx.x} * stride;
  if (team == 0) {
#pragma unroll
    for (int v = 0; v < kMaxViews; ++v)
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int c = (i / VEC * TEAM + rank) * VEC + i % VEC;
        if (v < a.num_views && c < a.d) mine[v * a.d + c] = acc[v][i];
      }
    for (int c = a.num_views * a.d + rank; c < stride; c += TEAM)
      mine[c] = c == a.num_views * a.d ? zbar_square / (a.num_views * a.num_views) : 0.0f;
  }

  // the last block to come finishes; the fences order its reads after all writes
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  add_blocks<THREADS>(a.partial, gridDim.x, stride, a.num_views * a.d + 1, a.sums,
                      reinterpret_cast<double*>(scratch));
  if (threadIdx.x == 0) {
    a.sums[a.num_views * a.d + 1] = static_cast<double>(a.num_images);
    *a.ticket = 0;
  }
  __syncthreads();
  if (a.finish.state) finish<THREADS>(a.sums, a.num_views, a.d, a.finish, slots);
}

template <class T> struct Backward {
  const float* grad_z;     // [rows, d] or null
  const float* grad_sums;  // [views, d] or null: row r takes scale * grad_sums[r / rows_per_view]
  double scale;
  int64_t rows, rows_per_view;
  int d;
  const float* z;
  const double* inv_norm;
  T* grad_u;
};

template <class T, int THREADS, int VEC>
__global__ void __launch_bounds__(THREADS) backward_kernel(Backward<T> a) {
  const int lane = threadIdx.x % 32;
  const Multiplier scale(a.scale);
  const int64_t warps = int64_t{gridDim.x} * (THREADS / 32);
  for (int64_t row = int64_t{blockIdx.x} * (THREADS / 32) + threadIdx.x / 32; row < a.rows; row += warps) {
    const float* grad_s = a.grad_sums ? a.grad_sums + row / a.rows_per_view * a.d : nullptr;
    const float *grad_z = a.grad_z ? a.grad_z + row * a.d : nullptr, *z = a.z + row * a.d;
    const Multiplier inv(a.inv_norm[row]);
    const auto fetch = [&](int c, float* g, float* zc) {
      load<float, VEC>(z + c, zc);
      float rest[VEC] = {};
      if (grad_z) load<float, VEC>(grad_z + c, g);
      if (grad_s) load<float, VEC>(grad_s + c, rest);
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[j] = (grad_z ? g[j] : 0.0f) + (grad_s ? scale(rest[j]) : 0.0f);
    };
    float along = 0, g[VEC], zc[VEC];
    for (int c = lane * VEC; c < a.d; c += 32 * VEC) {
      fetch(c, g, zc);
#pragma unroll
      for (int j = 0; j < VEC; ++j) along = fmaf(g[j], zc[j], along);
    }
    along = warp_sum(along);
    // the row comes from L1 this time
    for (int c = lane * VEC; c < a.d; c += 32 * VEC) {
      fetch(c, g, zc);
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[j] = inv(fmaf(-along, zc[j], g[j]));
      store<T, VEC>(a.grad_u + row * a.d + c, g);
    }
  }
}

// Launchers. They return what cudaGetLastError says, and wait for nothing.

inline int forward_blocks(int64_t num_images, int d, bool aligned) {
  const int64_t images_per_block = aligned && d <= 256 ? 32 : 8;
  const int64_t blocks = (num_images + images_per_block - 1) / images_per_block;
  return static_cast<int>(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

// whether four elements can be moved at once
template <class T> bool is_aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; }

template <class T> cudaError_t launch_forward(const Forward<T>& a, cudaStream_t stream) {
  const bool aligned = a.d % 4 == 0 && is_aligned(a.u) && is_aligned(a.z);
  const int blocks = forward_blocks(a.num_images, a.d, aligned);
  if (!aligned) forward_kernel<T, 256, 256, 1, 16><<<blocks, 256, 0, stream>>>(a);
  else if (a.d <= 256) forward_kernel<T, 1024, 32, 4, 2><<<blocks, 1024, 0, stream>>>(a);
  else if (a.d <= 1024) forward_kernel<T, 256, 32, 4, 8><<<blocks, 256, 0, stream>>>(a);
  else forward_kernel<T, 256, 256, 4, 4><<<blocks, 256, 0, stream>>>(a);
  return cudaGetLastError();
}

inline cudaError_t launch_finish(const double* sums, int num_views, int d, const Finish& f, cudaStream_t stream) {
  finish_kernel<256><<<1, 256, 0, stream>>>(sums, num_views, d, f);
  return cudaGetLastError();
}

template <class T> cudaError_t launch_backward(const Backward<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int64_t blocks = (a.rows + 7) / 8;
  const int grid = static_cast<int>(blocks < 16 * kMaxBlocks ? blocks : 16 * kMaxBlocks);
  const bool aligned = a.d % 4 == 0 && is_aligned(a.grad_u) && is_aligned(a.z) && is_aligned(a.grad_z) &&
                       is_aligned(a.grad_sums);
  if (aligned) backward_kernel<T, 256, 4><<<grid, 256, 0, stream>>>(a);
  else backward_kernel<T, 256, 1><<<grid, 256, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace upstep
