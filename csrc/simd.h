// Vectors of fp32 for one processor capability. A file that includes this is compiled once per capability, with
// UPSTEP_CAPABILITY (its namespace) and UPSTEP_LANES (fp32 lanes of a vector); block_cpu.h chooses at run time.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>

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

inline Vec load(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Words) << 16);
}

// rounds to nearest even; a NaN stays one
inline void store(BFloat16* p, Vec v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves);
  std::memcpy(p, &h, sizeof h);
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
template <class T> inline Vec load(const T* p, int count) {
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

template <class T> inline Vec take(const T* p, int count) { return count == kLanes ? load(p) : load(p, count); }

template <class T> inline void put(T* p, Vec v, int count) {
  if (count == kLanes) store(p, v);
  else store(p, v, count);
}

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

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

}  // namespace upstep::UPSTEP_CAPABILITY
