// The rows of one head of attention, and their layouts as the b of a product (tile.h).
#pragma once

#include "block_cpu.h"
#include "tile.h"

namespace upstep::UPSTEP_CAPABILITY {

// the transpose of a matrix [rows, columns] in panels; part: row, column, lanes -> values
template <class Part> void transposed(int64_t rows, int64_t columns, float* to, const Part& part) {
  for (int64_t j = 0; j < rows; j += kWide) {
    const int64_t wide = rows - j > kLanes ? kWide : kLanes;
    each(columns, [&](int64_t i, int n) {
      for (int64_t t = 0; t < wide; t += kLanes) {
        Vec square[kLanes];
        for (int row = 0; row < kLanes; ++row) square[row] = j + t + row < rows ? part(j + t + row, i, n) : Vec{};
        transpose(square);
        for (int column = 0; column < n; ++column) store(to + (i + column) * wide + t, square[column]);
      }
    });
    to += wide * columns;
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
    transposed(count, width, to, [&](int64_t t, int64_t i, int n) { return take(at + t * stride + i, n); });
  }

  // to the cache, as processors do not foresee rows so far apart: backward takes 0.9 of the time in fp32 (AVX2)
  void prefetch() const {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(at + t * stride + i, 0, 2);
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

template <class T> void prefetch_inputs(const AttentionCall& a, int64_t pair) {
  const Inputs<T> in(a, pair);
  in.q.prefetch(), in.k.prefetch(), in.v.prefetch();
}

template <class T> Head<T> head_of(void* values, const AttentionCall& a, int64_t pair) {
  const int64_t image = pair / a.heads, head = pair % a.heads, across = a.heads * a.width;
  return {static_cast<T*>(values) + image * a.tokens * across + head * a.width, across, a.tokens, a.width};
}

template <class T> void write(const Head<T>& to, int64_t first, int64_t rows, const float* from, int64_t wide) {
  for (int64_t i = 0; i < rows; ++i)
    each(to.width, [&](int64_t j, int n) {
      put(to.at + (first + i) * to.stride + j, load(from + i * wide + j), n);
    });
}

#ifdef __AVX512BF16__
// attention_pairs_cpu.cpp
void attention_of_pairs(const AttentionCall&, int64_t begin, int64_t end);
void attention_of_pairs_backward(const AttentionCall&, int64_t begin, int64_t end);
#endif

}  // namespace upstep::UPSTEP_CAPABILITY
