// Vectors of fp32 for one processor capability. A file that includes this is compiled once per capability, with
// UPSTEP_CAPABILITY (its namespace) and UPSTEP_LANES (fp32 lanes of a vector); block_cpu.h chooses at run time.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <utility>
#if UPSTEP_LANES >= 8
#include <immintrin.h>
#endif

namespace upstep::UPSTEP_CAPABILITY {

constexpr int kLanes = UPSTEP_LANES;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
using c10::BFloat16;

inline Vec same(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// two values in bf16, the first in the low half
typedef uint32_t Pair __attribute__((may_alias));

inline Words load(const Pair* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Words) << 16);
}

// rounds to nearest even; a NaN stays one
inline void store(BFloat16* p, Vec v) {
#ifdef __AVX512BF16__
  // one instruction instead of nine; it takes denormal numbers as 0
  const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &h, sizeof h);
#else
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline Vec load(const uint8_t* p) {
  Bytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, Ints), Vec);
}

// integers in [0, 255]: to nearest, since the last bit of a number at 2^23 is 1
inline void store(uint8_t* p, Vec v) {
  const Words bits = reinterpret_cast<Words>(v + 8388608.0f) & 255;
  const Bytes b = __builtin_convertvector(bits, Bytes);
  std::memcpy(p, &b, sizeof b);
}

// the first `count` lanes; 0 in the others
template <class T> inline auto load(const T* p, int count) {
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : static_cast<T>(0);
  return load(lanes);
}

template <class T> inline void store(T* p, Vec v, int count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// f(offset, lanes) over n values: whole vectors, then what is left
template <class F> inline void each(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T> inline auto take(const T* p, int count) { return count == kLanes ? load(p) : load(p, count); }

template <class T> inline void put(T* p, Vec v, int count) {
  if (count == kLanes) store(p, v);
  else store(p, v, count);
}

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// b where one of them is a NaN. Compilers make a comparison and a choice of `a > b ? a : b`: GELU in fp32 took 1.25 times
// as long. GCC 12 warns of the intrinsics without a mask.
#if UPSTEP_LANES == 16
inline Vec larger(Vec a, Vec b) { return _mm512_mask_max_ps(a, 0xffff, a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_mask_min_ps(a, 0xffff, a, b); }
#elif UPSTEP_LANES == 8
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

// 1 / x for results in bf16: within 7e-5
#if UPSTEP_LANES == 16
inline Vec short_inverse(Vec x) { return _mm512_mask_rcp14_ps(x, 0xffff, x); }
#else
inline Vec short_inverse(Vec x) { return 1.0f / x; }
#endif

// lanes of two vectors: those at which the bit D of the lane is not set from a, or that distance higher, and from b
template <int D, int kHigher, size_t... kLane> inline Vec merged(Vec a, Vec b, std::index_sequence<kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kLane & D ? kLanes + kLane - D + kHigher : kLane + kHigher)...);
#else
  return __builtin_shuffle(a, b, Ints{(kLane & D ? kLanes + kLane - D + kHigher : kLane + kHigher)...});
#endif
}

// rows of a square become its columns, by exchanges at the distances 1, 2, 4 and so on. One value at a time, attention in
// bf16 took 1.3 times as long.
template <int D = 1> inline void transpose(Vec* rows) {
  if constexpr (D < kLanes) {
    const auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & D) == 0) {
        const Vec a = rows[i], b = rows[i + D];
        rows[i] = merged<D, 0>(a, b, lanes), rows[i + D] = merged<D, D>(a, b, lanes);
      }
    transpose<2 * D>(rows);
  }
}

// 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2: relative error 2e-7 in [-87, 88], 0 below, saturated above; NaN stays
inline Vec exp(Vec x) {
  const Vec in_range = smaller(larger(x, same(-87.0f)), same(88.0f));
  const Vec shifted = in_range * 1.44269504f + 12582912.0f;  // the low bits are n
  const Vec n = shifted - 12582912.0f;
  const Vec r = (in_range - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = same(1.9875691500e-4f);  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints scaled = reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23);
  return x < -87.0f ? Vec{} : x == x ? reinterpret_cast<Vec>(scaled) : x;
}

// for results in bf16, which rounds by 2e-3: relative error 8e-5 in [-87, 87], saturated beyond. A NaN stays one if its
// last 9 bits are 0, as of values in bf16.
inline Vec short_exp(Vec x) {
  const Vec binary = smaller(same(126.0f), larger(same(-126.0f), x * 1.44269504f));
  const Vec shifted = binary + 12582912.0f;  // the low bits are the nearest integer n
  const Vec f = binary - (shifted - 12582912.0f);
  // minimax fit to 2^f, |f| <= 1/2
  const Vec p = ((0.0551716703f * f + 0.242611125f) * f + 0.693260985f) * f + 0.999928073f;
  return reinterpret_cast<Vec>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

}  // namespace upstep::UPSTEP_CAPABILITY
