// Pairs of values in bf16 for products by AVX512-BF16 (tile.h): of neighbors in a row, as they lie in memory, or of
// neighbors in a column.
#pragma once

#include "simd.h"

#ifdef __AVX512BF16__
namespace upstep::UPSTEP_CAPABILITY {

inline const Pair* pairs_of(const BFloat16* p) { return reinterpret_cast<const Pair*>(p); }

inline Words halves(const BFloat16* p, int count) {
  BFloat16 lanes[kLanes];
  if (count < kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : BFloat16(0, BFloat16::from_bits());
    p = lanes;
  }
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Words);
}

inline Words rounded(Vec v) {
  Halves h;
  store(reinterpret_cast<BFloat16*>(&h), v);
  return __builtin_convertvector(h, Words);
}

inline Words paired(Words first, Words second) { return first | second << 16; }

inline void store(Pair* p, Words v) { std::memcpy(p, &v, sizeof v); }

// rows of fp32, of `wide` values in whole vectors, as pairs of rows; 0 behind the last row
inline void pairs_of_rows(const float* from, int64_t rows, int64_t wide, Pair* to) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < wide; j += kLanes, to += kLanes) {
      const float* at = from + i * wide + j;
      store(to, paired(rounded(load(at)), i + 1 < rows ? rounded(load(at + wide)) : Words{}));
    }
}

}  // namespace upstep::UPSTEP_CAPABILITY
#endif
