// Small products in registers, for the passes of a block: c[m, n] (+)= a[m, k] b[k, n] with sums in fp32. a by strides;
// b and c in whole vectors of columns. a and b hold fp32, or pairs in bf16: two terms of the sum in each.
#pragma once

#include <algorithm>

#include "simd.h"

namespace upstep::UPSTEP_CAPABILITY {

constexpr bool kManyRegisters = UPSTEP_LANES >= 16;  // 32 of them instead of 16

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline void add_product(Vec& sum, float a, Vec b) { sum += a * b; }

#ifdef __AVX512BF16__
inline void add_product(Vec& sum, uint32_t a, Words b) {
  sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(Words{} + a), reinterpret_cast<__m512bh>(b));
}
#endif

template <int kM, int kN, class A> void tile(int64_t k, const A* a, int64_t row, int64_t step, const A* b, int64_t ldb,
                                             float* c, int64_t ldc, bool add) {
  Vec sums[kM][kN];
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kN; ++j) sums[i][j] = add ? load(c + i * ldc + j * kLanes) : Vec{};
  for (int64_t p = 0; p < k; ++p, a += step, b += ldb) {
    decltype(load(b)) columns[kN];
#pragma GCC unroll 3
    for (int j = 0; j < kN; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kN; ++j) add_product(sums[i][j], a[i * row], columns[j]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kN; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
}

// the tile of m <= kM rows
template <int kM, int kN, class A> void rows_of_tile(int64_t m, int64_t k, const A* a, int64_t row, int64_t step,
                                                     const A* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if (m == kM) tile<kM, kN>(k, a, row, step, b, ldb, c, ldc, add);
  else if constexpr (kM > 1) rows_of_tile<kM - 1, kN>(m, k, a, row, step, b, ldb, c, ldc, add);
}

template <int kM, int kN, class A> void columns_of_product(int64_t m, int64_t k, const A* a, int64_t row, int64_t step,
                                                           const A* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; i += kM)
    rows_of_tile<kM, kN>(std::min<int64_t>(kM, m - i), k, a + i * row, row, step, b, ldb, c + i * ldc, ldc, add);
}

// b in rows of `ldb` values; n is rounded up to whole vectors, which b and c must have
template <class A> void product_of_rows(int64_t m, int64_t n, int64_t k, const A* a, int64_t row, int64_t step,
                                        const A* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += 3 * kLanes, b += 3 * kLanes, c += 3 * kLanes) {
    if (n - j > 2 * kLanes) columns_of_product<kManyRegisters ? 8 : 4, 3>(m, k, a, row, step, b, ldb, c, ldc, add);
    else if (n - j > kLanes) columns_of_product<kManyRegisters ? 12 : 6, 2>(m, k, a, row, step, b, ldb, c, ldc, add);
    else columns_of_product<12, 1>(m, k, a, row, step, b, ldb, c, ldc, add);
  }
}

constexpr int kWide = 2 * kLanes;                // columns of a panel
constexpr int kRows = kManyRegisters ? 12 : 6;  // rows of a tile: 12 or 24 sums in registers

// b in panels of kWide columns (the last may be of kLanes)
template <class A> void product_of_panels(int64_t m, int64_t n, int64_t k, const A* a, int64_t row, int64_t step,
                                          const A* b, float* c, int64_t ldc, bool add = false) {
  for (int64_t j = 0; j < n; j += kWide, b += kWide * k)
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t height = std::min<int64_t>(kRows, m - i);
      if (n - j > kLanes) rows_of_tile<kRows, 2>(height, k, a + i * row, row, step, b, kWide, c + i * ldc + j, ldc, add);
      else rows_of_tile<kRows, 1>(height, k, a + i * row, row, step, b, kLanes, c + i * ldc + j, ldc, add);
    }
}

}  // namespace upstep::UPSTEP_CAPABILITY
