// Softmax attention of one head at a time on a CPU, forward and backward, in fp32, with the scores in the cache: some
// rows of them at once, never all. The formula: kernels/attention. Compiled once per capability (simd.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "block_cpu.h"
#include "scratch.h"
#include "tile.h"

namespace upstep::UPSTEP_CAPABILITY {
namespace {

constexpr int kWide = 2 * kLanes;                 // columns of a panel
constexpr int kRows = kManyRegisters ? 12 : 6;  // rows of a tile: 12 or 24 sums in registers
constexpr int64_t kChunk = 8 * kRows;             // rows of scores at once

// b in panels of kWide columns (the last may be of kLanes)
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t step, const float* b, float* c,
             int64_t ldc, bool add = false) {
  for (int64_t j = 0; j < n; j += kWide, b += kWide * k)
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t height = std::min<int64_t>(kRows, m - i);
      if (n - j > kLanes) rows_of_tile<kRows, 2>(height, k, a + i * row, row, step, b, kWide, c + i * ldc + j, ldc, add);
      else rows_of_tile<kRows, 1>(height, k, a + i * row, row, step, b, kLanes, c + i * ldc + j, ldc, add);
    }
}

// rows of one head: `count` rows of `width` values, `stride` apart
template <class T> struct Head {
  T* at;
  int64_t stride, count, width;

  // times `scale`, as rows of width values
  void rows(float scale, float* to) const {
    for (int64_t t = 0; t < count; ++t)
      each(width, [&](int64_t i, int n) { put(to + t * width + i, scale * take(at + t * stride + i, n), n); });
  }

  // as the b of a product: [count, width] in panels
  void panels(float* to) const {
    for (int64_t j = 0; j < width; j += kWide) {
      const int64_t wide = width - j > kLanes ? kWide : kLanes;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = j; i < j + wide; i += kLanes, to += kLanes)
          store(to, i + kLanes <= width ? load(at + t * stride + i)
                                        : load(at + t * stride + i, static_cast<int>(std::max<int64_t>(width - i, 0))));
    }
  }

  // the transpose as the b of a product: [width, count] in panels
  void transposed_panels(float* to) const {
    for (int64_t j = 0; j < count; j += kWide) {
      const int64_t wide = count - j > kLanes ? kWide : kLanes, real = std::min(wide, count - j);
      for (int64_t t = 0; t < real; ++t)
        for (int64_t i = 0; i < width; ++i) to[i * wide + t] = static_cast<float>(at[(j + t) * stride + i]);
      for (int64_t t = real; t < wide; ++t)
        for (int64_t i = 0; i < width; ++i) to[i * wide + t] = 0;
      to += wide * width;
    }
  }

  Head part(int64_t first, int64_t number) const { return {at + first * stride, stride, number, width}; }
};

template <class T> struct Inputs {
  Head<T> q, k, v;

  Inputs(const AttentionCall& a, int64_t pair) {
    const int64_t image = pair / a.heads, head = pair % a.heads, across = a.heads * a.width;
    T* at = static_cast<T*>(a.qkv) + image * a.tokens * 3 * across + head * a.width;
    q = {at, 3 * across, a.tokens, a.width}, k = {at + across, 3 * across, a.tokens, a.width};
    v = {at + 2 * across, 3 * across, a.tokens, a.width};
  }
};

template <class T> Head<T> head_of(void* values, const AttentionCall& a, int64_t pair) {
  const int64_t image = pair / a.heads, head = pair % a.heads, across = a.heads * a.width;
  return {static_cast<T*>(values) + image * a.tokens * across + head * a.width, across, a.tokens, a.width};
}

// scores -> exp(scores - their maximum), not yet divided by their sum; returns maximum and sum
std::pair<float, float> exponentials(float* row, int64_t tokens) {
  const int64_t wide = padded(tokens);
  std::fill(row + tokens, row + wide, -std::numeric_limits<float>::infinity());
  Vec top = load(row);
  for (int64_t i = kLanes; i < wide; i += kLanes) top = larger(top, load(row + i));
  float most = top[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, top[i]);
  Vec total{};
  for (int64_t i = 0; i < wide; i += kLanes) {
    const Vec p = exp(load(row + i) - most);
    total += p;
    store(row + i, p);
  }
  return {most, sum(total)};
}

template <class T> void forward(const AttentionCall& a, int64_t begin, int64_t end) {
  const int64_t T_ = a.tokens, d = a.width, wide_t = padded(T_), wide_d = padded(d), chunk = std::min(kChunk, T_);
  Scratch memory(d * wide_t + T_ * wide_d + chunk * (d + wide_t + wide_d) + 5 * 16);
  float *keys = memory.take(d * wide_t), *values = memory.take(T_ * wide_d), *q = memory.take(chunk * d);
  float *scores = memory.take(chunk * wide_t), *out = memory.take(chunk * wide_d);
  for (int64_t pair = begin; pair < end; ++pair) {
    const Inputs<T> in(a, pair);
    const Head<T> to = head_of<T>(a.out, a, pair);
    in.k.transposed_panels(keys), in.v.panels(values);
    for (int64_t t = 0; t < T_; t += chunk) {
      const int64_t rows = std::min(chunk, T_ - t);
      in.q.part(t, rows).rows(a.scale, q);
      product(rows, wide_t, d, q, d, 1, keys, scores, wide_t);
      float sums[kChunk];
      for (int64_t i = 0; i < rows; ++i) {
        const auto [most, total] = exponentials(scores + i * wide_t, T_);
        sums[i] = total;
        a.lse[pair * T_ + t + i] = most + std::log(total);
      }
      product(rows, wide_d, T_, scores, wide_t, 1, values, out, wide_d);
      for (int64_t i = 0; i < rows; ++i)
        each(d, [&](int64_t j, int n) {
          put(to.at + (t + i) * to.stride + j, load(out + i * wide_d + j) / sums[i], n);
        });
    }
  }
}

template <class T> void write(const Head<T>& to, int64_t first, int64_t rows, const float* from, int64_t wide) {
  for (int64_t i = 0; i < rows; ++i)
    each(to.width, [&](int64_t j, int n) {
      put(to.at + (first + i) * to.stride + j, load(from + i * wide + j), n);
    });
}

template <class T> void backward(const AttentionCall& a, int64_t begin, int64_t end) {
  const int64_t T_ = a.tokens, d = a.width, wide_t = padded(T_), wide_d = padded(d), chunk = std::min(kChunk, T_);
  Scratch memory(2 * d * wide_t + 3 * T_ * wide_d + chunk * (2 * d + 2 * wide_t + 3 * wide_d) + 12 * 16);
  float *keys_t = memory.take(d * wide_t), *values_t = memory.take(d * wide_t), *keys = memory.take(T_ * wide_d);
  float *dk = memory.take(T_ * wide_d), *dv = memory.take(T_ * wide_d);
  float *q = memory.take(chunk * d), *g = memory.take(chunk * d), *dq = memory.take(chunk * wide_d);
  float *q_panels = memory.take(chunk * wide_d), *g_panels = memory.take(chunk * wide_d);
  float *p = memory.take(chunk * wide_t), *ds = memory.take(chunk * wide_t);
  AttentionCall to = a;
  to.qkv = a.dqkv;
  for (int64_t pair = begin; pair < end; ++pair) {
    const Inputs<T> in(a, pair), out(to, pair);
    const Head<T> grad = head_of<T>(a.grad, a, pair), o = head_of<T>(a.out, a, pair);
    in.k.transposed_panels(keys_t), in.v.transposed_panels(values_t), in.k.panels(keys);
    for (int64_t t = 0; t < T_; t += chunk) {
      const int64_t rows = std::min(chunk, T_ - t);
      in.q.part(t, rows).rows(a.scale, q), grad.part(t, rows).rows(1, g);
      in.q.part(t, rows).panels(q_panels), grad.part(t, rows).panels(g_panels);
      product(rows, wide_t, d, q, d, 1, keys_t, p, wide_t);
      product(rows, wide_t, d, g, d, 1, values_t, ds, wide_t);
      for (int64_t i = 0; i < rows; ++i) {
        Vec along{};
        each(d, [&](int64_t j, int n) { along += take(g + i * d + j, n) * take(o.at + (t + i) * o.stride + j, n); });
        const float delta = sum(along), lse = a.lse[pair * T_ + t + i];
        float *row = p + i * wide_t, *row_ds = ds + i * wide_t;
        for (int64_t j = 0; j < wide_t; j += kLanes) {
          const Vec share = exp(load(row + j) - lse);
          store(row + j, share);
          store(row_ds + j, a.scale * share * (load(row_ds + j) - delta));
        }
      }
      product(rows, wide_d, T_, ds, wide_t, 1, keys, dq, wide_d);
      product(T_, wide_d, rows, ds, 1, wide_t, q_panels, dk, wide_d, t > 0);
      product(T_, wide_d, rows, p, 1, wide_t, g_panels, dv, wide_d, t > 0);
      write(out.q, t, rows, dq, wide_d);
    }
    write(out.k, 0, T_, dk, wide_d), write(out.v, 0, T_, dv, wide_d);
  }
}

}  // namespace

void attention(const AttentionCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? forward<float>(a, begin, end) : forward<BFloat16>(a, begin, end);
}

void attention_backward(const AttentionCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? backward<float>(a, begin, end) : backward<BFloat16>(a, begin, end);
}

}  // namespace upstep::UPSTEP_CAPABILITY
