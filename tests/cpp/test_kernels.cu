// The CUDA kernels without torch, for compute-sanitizer: every instance of each kernel against plain loops in double.
//   cmake --build BUILD --target test_kernels && compute-sanitizer --tool memcheck BUILD/test_kernels
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "center_vector.cuh"

using namespace upstep;

namespace {

int failures = 0;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

void expect_near(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return;
  std::printf("%s: got %.9g, want %.9g\n", what, got, want);
  ++failures;
}

// device memory of exactly this size, so that memcheck sees the first cell past its end
template <class T> struct Device {
  explicit Device(const std::vector<T>& from) : size(from.size()) {
    check(cudaMalloc(&at, size * sizeof(T)));
    check(cudaMemcpy(at, from.data(), size * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit Device(size_t size) : size(size) { check(cudaMalloc(&at, size * sizeof(T))); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(at); }
  std::vector<T> read() const {
    std::vector<T> to(size);
    check(cudaMemcpy(to.data(), at, size * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }
  T* at = nullptr;
  size_t size;
};

template <class T> T rounded(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

template <class T> double wide(T x) { return static_cast<float>(x); }

template <class T> void run(int64_t num_images, int num_views, int d) {
  const int64_t rows = num_images * num_views;
  std::mt19937 random(static_cast<unsigned>(rows * 7 + d));
  std::normal_distribution<float> normal(0.3f, 1.0f);
  std::vector<T> u(rows * d);
  for (T& x : u) x = rounded<T>(normal(random));
  std::vector<float> grad(rows * d);
  for (float& x : grad) x = normal(random);

  std::vector<double> z(rows * d), inv(rows), s(d, 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    double square = 0;
    for (int c = 0; c < d; ++c) square += wide(u[r * d + c]) * wide(u[r * d + c]);
    inv[r] = 1 / std::sqrt(square);
    for (int c = 0; c < d; ++c) s[c] += (z[r * d + c] = wide(u[r * d + c]) * inv[r]) / static_cast<double>(rows);
  }

  std::vector<double> state(kHead + d, 0.0);
  state[kReference] = NAN;
  const Device<T> u_(u);
  const Device<double> state_(state), inv_(rows), sums_(num_views * d + 2), next_(kHead + d);
  const Device<float> z_(rows * d), center_(d), grad_(grad);
  const int stride = partial_stride(num_views, d);
  const Device<float> partial_(static_cast<size_t>(forward_blocks(num_images, d, false)) * stride);
  int64_t* flag = nullptr;
  check(cudaHostAlloc(&flag, sizeof(int64_t), cudaHostAllocDefault));
  *flag = 0;
  const Gate gate{kEma, true, 0.9, 0.5, 16, 0.9, flag};
  const Finish end{state_.at, gate, center_.at, next_.at};
  unsigned* ticket = reinterpret_cast<unsigned*>(state_.at + kTicket);
  std::vector<float> first;
  for (int repeat = 0; repeat < 3; ++repeat) {
    check(launch_forward(Forward<T>{u_.at, num_images, num_views, d, z_.at, inv_.at, partial_.at, ticket, sums_.at, end}, 0));
    check(cudaDeviceSynchronize());
    const std::vector<float> center = center_.read();
    if (repeat == 0) first = center;
    if (center != first) std::printf("not deterministic: %lld x %d\n", static_cast<long long>(rows), d), ++failures;
  }
  const std::vector<float> got_z = z_.read();
  const std::vector<double> next = next_.read();
  double m = 0;
  for (int c = 0; c < d; ++c) m += s[c] * s[c];
  for (int64_t i = 0; i < rows * d; ++i) expect_near("z", got_z[i], z[i], 2e-7);
  for (int c = 0; c < d; ++c) expect_near("center", first[c], s[c], 1e-6);
  expect_near("magnitude", next[kMagnitude], std::sqrt(m), 1e-6);
  expect_near("step", next[kStep], 1, 0);
  expect_near("flag", static_cast<double>(*flag), static_cast<double>(flag_word(1, true, true)), 0);
  expect_near("ticket", state_.read()[kTicket], 0, 0);

  check(launch_finish(sums_.at, num_views, d, end, 0));
  check(cudaDeviceSynchronize());
  if (center_.read() != first) std::printf("finish differs from the fused form\n"), ++failures;

  const Device<T> grad_u_(rows * d);
  check(launch_backward(Backward<T>{grad_.at, center_.at, 0.25, rows, rows, d, z_.at, inv_.at, grad_u_.at}, 0));
  check(cudaDeviceSynchronize());
  const std::vector<T> got = grad_u_.read();
  for (int64_t r = 0; r < rows; ++r) {
    double along = 0;
    const auto g = [&](int c) { return grad[r * d + c] + 0.25 * s[c]; };
    for (int c = 0; c < d; ++c) along += g(c) * z[r * d + c];
    for (int c = 0; c < d; ++c) {
      const double want = inv[r] * (g(c) - along * z[r * d + c]);
      expect_near("du", wide(got[r * d + c]), want, 1e-2 * std::fabs(want) + 1e-5);
    }
  }
  cudaFreeHost(flag);
}

}  // namespace

int main() {
  for (int d : {1, 4, 7, 128, 256, 260, 1000, 1025, 1028, 4096})
    for (int64_t num_images : {1, 33, 300})
      for (int num_views : {1, 2}) {
        run<float>(num_images, num_views, d);
        run<__half>(num_images, num_views, d);
        run<__nv_bfloat16>(num_images, num_views, d);
      }
  std::printf(failures ? "%d failures\n" : "all kernels agree\n", failures);
  return failures ? 1 : 0;
}
