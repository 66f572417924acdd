// Softmax attention of one head at a time on a CPU, forward and backward, in fp32, with the scores in the cache: some
// rows of them at once, never all. The formula: kernels/attention. Compiled once per capability (simd.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "block_cpu.h"
#include "heads.h"
#include "scratch.h"

namespace upstep::UPSTEP_CAPABILITY {
namespace {

constexpr int64_t kChunk = 8 * kRows;  // rows of scores at once

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
    if (pair + 1 < end) prefetch_inputs<T>(a, pair + 1);
    in.k.transposed_panels(keys), in.v.panels(values);
    for (int64_t t = 0; t < T_; t += chunk) {
      const int64_t rows = std::min(chunk, T_ - t);
      in.q.part(t, rows).rows(a.scale, q);
      product_of_panels(rows, wide_t, d, q, d, 1, keys, scores, wide_t);
      float sums[kChunk];
      for (int64_t i = 0; i < rows; ++i) {
        const auto [most, total] = exponentials(scores + i * wide_t, T_);
        sums[i] = total;
        a.lse[pair * T_ + t + i] = most + std::log(total);
      }
      product_of_panels(rows, wide_d, T_, scores, wide_t, 1, values, out, wide_d);
      for (int64_t i = 0; i < rows; ++i)
        each(d, [&](int64_t j, int n) {
          put(to.at + (t + i) * to.stride + j, load(out + i * wide_d + j) / sums[i], n);
        });
    }
  }
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
    if (pair + 1 < end) {
      prefetch_inputs<T>(a, pair + 1), prefetch_inputs<T>(to, pair + 1);
      head_of<T>(a.grad, a, pair + 1).prefetch(), head_of<T>(a.out, a, pair + 1).prefetch();
    }
    in.k.transposed_panels(keys_t), in.v.transposed_panels(values_t), in.k.panels(keys);
    for (int64_t t = 0; t < T_; t += chunk) {
      const int64_t rows = std::min(chunk, T_ - t);
      in.q.part(t, rows).rows(a.scale, q), grad.part(t, rows).rows(1, g);
      in.q.part(t, rows).panels(q_panels), grad.part(t, rows).panels(g_panels);
      product_of_panels(rows, wide_t, d, q, d, 1, keys_t, p, wide_t);
      product_of_panels(rows, wide_t, d, g, d, 1, values_t, ds, wide_t);
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
      product_of_panels(rows, wide_d, T_, ds, wide_t, 1, keys, dq, wide_d);
      product_of_panels(T_, wide_d, rows, ds, 1, wide_t, q_panels, dk, wide_d, t > 0);
      product_of_panels(T_, wide_d, rows, p, 1, wide_t, g_panels, dv, wide_d, t > 0);
      write(out.q, t, rows, dq, wide_d);
    }
    write(out.k, 0, T_, dk, wide_d), write(out.v, 0, T_, dv, wide_d);
  }
}

}  // namespace

void attention(const AttentionCall& a, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (a.real == Real::kBFloat16 && a.width % 2 == 0) return attention_of_pairs(a, begin, end);
#endif
  a.real == Real::kFloat ? forward<float>(a, begin, end) : forward<BFloat16>(a, begin, end);
}

void attention_backward(const AttentionCall& a, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (a.real == Real::kBFloat16 && a.width % 2 == 0) return attention_of_pairs_backward(a, begin, end);
#endif
  a.real == Real::kFloat ? backward<float>(a, begin, end) : backward<BFloat16>(a, begin, end);
}

}  // namespace upstep::UPSTEP_CAPABILITY
