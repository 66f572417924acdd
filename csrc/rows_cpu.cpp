// Norm with residual and GELU of a block on a CPU, each as one pass over rows that stay in the cache; sums in fp32.
// Compiled once per capability (simd.h). Every row has a fixed order of additions, whatever the number of threads.
#include <cmath>

#include "block_cpu.h"
#include "simd.h"

namespace upstep::UPSTEP_CAPABILITY {
namespace {

template <class T> void norm_rows(const NormCall& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.k;
    const T* x = static_cast<const T*>(a.x) + at;
    const T* total = x;
    Vec sums{};
    if (a.delta) {
      const T* delta = static_cast<const T*>(a.delta) + at;
      T* to = static_cast<T*>(a.total) + at;
      each(a.k, [&](int64_t i, int n) { put(to + i, take(x + i, n) + take(delta + i, n), n); });
      total = to;
    }
    each(a.k, [&](int64_t i, int n) { sums += take(total + i, n); });
    const float mean = sum(sums) / a.k;
    Vec squares{};
    each(a.k, [&](int64_t i, int n) {
      Vec v = take(total + i, n) - mean;
      for (int lane = n; lane < kLanes; ++lane) v[lane] = 0;  // lanes behind the row
      squares += v * v;
    });
    const float rstd = 1 / std::sqrt(sum(squares) / a.k + a.eps);
    T* x_hat = static_cast<T*>(a.x_hat) + at;
    each(a.k, [&](int64_t i, int n) { put(x_hat + i, (take(total + i, n) - mean) * rstd, n); });
    a.rstd[row] = rstd;
  }
}

template <class T> void norm_backward_rows(const NormBackwardCall& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.k;
    const T *d = static_cast<const T*>(a.d) + at, *x_hat = static_cast<const T*>(a.x_hat) + at;
    const T* skip = a.skip ? static_cast<const T*>(a.skip) + at : nullptr;
    T* dx = static_cast<T*>(a.dx) + at;
    Vec sums{}, products{};
    each(a.k, [&](int64_t i, int n) {
      const Vec v = take(d + i, n);
      sums += v;
      products += v * take(x_hat + i, n);
    });
    const float rstd = a.rstd[row], mean = sum(sums) / a.k, along = sum(products) / a.k;
    each(a.k, [&](int64_t i, int n) {
      const Vec v = rstd * (take(d + i, n) - mean - along * take(x_hat + i, n));
      put(dx + i, skip ? v + take(skip + i, n) : v, n);
    });
  }
}

struct Share {
  Vec share, derivative;
};

// Phi(-|x|) = t (c0 + c1 t + ...) exp(-x^2 / 2), minimax fits to erfc(z) exp(z^2): with t = 1 / (1 + 0.4 |x| / sqrt 2)
// and degree 8 within 1.3e-7 of its own size, 5e-7 in fp32; in bf16 with 0.525 and degree 4 within 3.5e-5, 1.2e-4 with
// the short exponential: GELU takes 0.7 of the time on AVX512-BF16
template <class T> inline Vec tail_of(Vec size, Vec bell) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const Vec t = 1.0f / (1.0f + 0.28284271f * size);
    constexpr float c[] = {0.112837931f,  0.112834801f,   0.103921288f,  0.0842715817f, 0.0707130017f,
                           -0.00279715366f, 0.0845339385f, -0.0914447514f, 0.0251294255f};
    Vec p = same(c[8]);
    for (int i = 7; i >= 0; --i) p = p * t + c[i];
    return p * t * bell;
  } else {
    const Vec t = short_inverse(1.0f + 0.37123106f * size);
    return ((((-0.0902648f * t + 0.207154705f) * t + 0.07831474f) * t + 0.157349655f) * t + 0.147459675f) * t * bell;
  }
}

template <class T> inline Vec exp_for(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) return exp(x);
  else return short_exp(x);
}

template <class T, int kKind> inline Share share_of(Vec x) {
  if constexpr (kKind == 0) {
    const Vec bell = exp_for<T>(-0.5f * x * x), tail = tail_of<T>(x < 0.0f ? -x : x, bell);
    const Vec share = x < 0.0f ? tail : 1.0f - tail;
    return {share, share + 0.39894228f * x * bell};
  } else {
    const Vec u = x != x ? x : smaller(larger(x, same(-64.0f)), same(64.0f));  // its cube is finite
    const Vec logit = kKind == 1 ? 1.59576912f * u * (1.0f + 0.044715f * u * u) : 1.702f * u;
    const Vec slope = kKind == 1 ? 1.59576912f * (1.0f + 0.134145f * u * u) : same(1.702f);
    const Vec share = 1.0f / (1.0f + exp_for<T>(-logit));
    return {share, share + u * slope * share * (1.0f - share)};
  }
}

template <class T, int kKind> void gelu_values(const GeluCall& a, int64_t begin, int64_t end) {
  const T* u = static_cast<const T*>(a.u) + begin;
  T *g = static_cast<T*>(a.g) + begin, *d = static_cast<T*>(a.derivative) + begin;
  uint8_t* bytes = static_cast<uint8_t*>(a.derivative) + begin;
  each(end - begin, [&](int64_t i, int n) {
    const Vec x = take(u + i, n);
    const Share s = share_of<T, kKind>(x);
    put(g + i, x * s.share, n);
    if (a.as_byte) put(bytes + i, 200.0f * s.derivative + 26.0f, n);
    else if (a.derivative) put(d + i, s.derivative, n);
  });
}

template <class T> void gelu_of(const GeluCall& a, int64_t begin, int64_t end) {
  if (a.kind == 0) gelu_values<T, 0>(a, begin, end);
  else if (a.kind == 1) gelu_values<T, 1>(a, begin, end);
  else gelu_values<T, 2>(a, begin, end);
}

template <class T> void gelu_backward_values(const GeluBackwardCall& a, int64_t begin, int64_t end) {
  const T* dg = static_cast<const T*>(a.dg) + begin;
  T* du = static_cast<T*>(a.du) + begin;
  const uint8_t* q = a.derivative + begin;
  each(end - begin, [&](int64_t i, int n) { put(du + i, take(dg + i, n) * ((take(q + i, n) - 26.0f) * 0.005f), n); });
}

}  // namespace

void norm(const NormCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? norm_rows<float>(a, begin, end) : norm_rows<BFloat16>(a, begin, end);
}

void norm_backward(const NormBackwardCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? norm_backward_rows<float>(a, begin, end) : norm_backward_rows<BFloat16>(a, begin, end);
}

void gelu(const GeluCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? gelu_of<float>(a, begin, end) : gelu_of<BFloat16>(a, begin, end);
}

void gelu_backward(const GeluBackwardCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? gelu_backward_values<float>(a, begin, end) : gelu_backward_values<BFloat16>(a, begin, end);
}

}  // namespace upstep::UPSTEP_CAPABILITY
