// The center vector on the CPU. Sums are taken over chunks of images whose number depends on the shape alone, and the
// chunks are added in order, so the result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "center_vector.h"

namespace upstep {
namespace {

constexpr int64_t kMaxChunks = 64, kMinImages = 16;
constexpr int kLanes = 8;  // independent sums, so that the compiler may vectorize them

// wider vectors where the processor has them; the order of additions, and with it every bit, stays the same
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define UPSTEP_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define UPSTEP_CLONES
#endif

int64_t num_chunks(int64_t num_images) {
  return std::clamp<int64_t>((num_images + kMinImages - 1) / kMinImages, 1, kMaxChunks);
}

UPSTEP_CLONES double dot(const float* a, const float* b, int d) {
  double lanes[kLanes] = {};
  int c = 0;
  for (; c + kLanes <= d; c += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(a[c + j]) * b[c + j];
  for (int j = 0; c < d; ++c, ++j) lanes[j] += static_cast<double>(a[c]) * b[c];
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

UPSTEP_CLONES void multiply(float* row, double by, int d) {
  for (int c = 0; c < d; ++c) row[c] = static_cast<float>(row[c] * by);
}

UPSTEP_CLONES void add(const float* z, double* sum, float* zbar, int d) {
  for (int c = 0; c < d; ++c) {
    sum[c] += z[c];
    zbar[c] += z[c];
  }
}

template <class T> void sum_chunk(const ForwardCall& a, int64_t begin, int64_t end, double* sums) {
  const T* u = static_cast<const T*>(a.u);
  std::fill_n(sums, a.num_views * a.d + 1, 0.0);
  std::vector<float> zbar(a.d);
  for (int64_t image = begin; image < end; ++image) {
    std::fill(zbar.begin(), zbar.end(), 0.0f);
    for (int v = 0; v < a.num_views; ++v) {
      const int64_t row = v * a.num_images + image;
      float* z = a.z + row * a.d;
      for (int c = 0; c < a.d; ++c) z[c] = static_cast<float>(u[row * a.d + c]);
      const double inv = inverse_norm(dot(z, z, a.d));
      multiply(z, inv, a.d);
      a.inv_norm[row] = inv;
      add(z, sums + v * a.d, zbar.data(), a.d);
    }
    sums[a.num_views * a.d] += dot(zbar.data(), zbar.data(), a.d) / (a.num_views * a.num_views);
  }
}

template <class T> void forward(const ForwardCall& a, double* workspace) {
  const int64_t chunks = num_chunks(a.num_images), width = a.num_views * a.d + 1;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      sum_chunk<T>(a, k * a.num_images / chunks, (k + 1) * a.num_images / chunks, workspace + k * width);
  });
  std::fill_n(a.sums, width, 0.0);
  for (int64_t k = 0; k < chunks; ++k)
    for (int64_t c = 0; c < width; ++c) a.sums[c] += workspace[k * width + c];
  a.sums[width] = static_cast<double>(a.num_images);
}

template <class T> void backward(const BackwardCall& a) {
  torch::stable::parallel_for(0, a.rows, kMinImages, [&](int64_t begin, int64_t end) {
    std::vector<float> g(a.d);
    for (int64_t row = begin; row < end; ++row) {
      const float* z = a.z + row * a.d;
      const float* grad_s = a.grad_sums ? a.grad_sums + row / a.rows_per_view * a.d : nullptr;
      for (int c = 0; c < a.d; ++c)
        g[c] = (a.grad_z ? a.grad_z[row * a.d + c] : 0) + (grad_s ? static_cast<float>(a.scale * grad_s[c]) : 0);
      const double along = dot(g.data(), z, a.d), inv = a.inv_norm[row];
      T* out = static_cast<T*>(a.grad_u) + row * a.d;
      for (int c = 0; c < a.d; ++c) out[c] = static_cast<T>(static_cast<float>(inv * (g[c] - along * z[c])));
    }
  });
}

}  // namespace

int64_t cpu_workspace(int64_t num_images, int num_views, int d) {
  return num_chunks(num_images) * (int64_t{num_views} * d + 1);
}

void finish_cpu(const ForwardCall& a) {
  const double num_images = a.sums[a.num_views * a.d + 1];
  const auto mean = [&](int v, int c) { return v < a.num_views ? a.sums[v * a.d + c] / num_images : 0.0; };
  const auto s = [&](int c) { return (mean(0, c) + mean(1, c)) / a.num_views; };
  double square = 0, square1 = 0, square2 = 0;
  for (int c = 0; c < a.d; ++c) {
    a.center[c] = static_cast<float>(s(c));
    square += s(c) * s(c);
    square1 += mean(0, c) * mean(0, c);
    square2 += mean(1, c) * mean(1, c);
  }
  const double m = std::sqrt(square), zbar_square = a.sums[a.num_views * a.d] / num_images;
  const int64_t word = decide(
      a.gate, a.state, {m, unbiased_square(m, zbar_square, num_images), std::sqrt(square1), std::sqrt(square2)}, a.next);
  for (int c = 0; c < a.d; ++c) a.next[kHead + c] = moved_center(a.gate, a.state, a.next, a.state[kHead + c], s(c));
  if (a.gate.flag) __atomic_store_n(a.gate.flag, word, __ATOMIC_RELEASE);
}

void forward_cpu(const ForwardCall& a, double* workspace) {
  if (a.real == Real::kFloat) forward<float>(a, workspace);
  else if (a.real == Real::kHalf) forward<c10::Half>(a, workspace);
  else forward<c10::BFloat16>(a, workspace);
  if (a.state) finish_cpu(a);
}

void backward_cpu(const BackwardCall& a) {
  if (a.real == Real::kFloat) backward<float>(a);
  else if (a.real == Real::kHalf) backward<c10::Half>(a);
  else backward<c10::BFloat16>(a);
}

}  // namespace upstep
