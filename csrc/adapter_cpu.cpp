// Gradients of a low-rank adapter on a CPU, as one pass over the rows of dy and x; products and sums in fp32. The
// formula: kernels/adapter_gradients.py. Compiled once per capability (simd.h). The rows are cut in chunks whose number
// does not depend on the threads; each chunk has sums of its own, which are added in order.
#include "block_cpu.h"
#include "pairs.h"
#include "scratch.h"
#include "tile.h"

namespace upstep::UPSTEP_CAPABILITY {
namespace {

constexpr int64_t kBlock = 48;  // rows that stay in the cache between the four products

// rows of `width` values as fp32, `stride` apart; whole vectors may be read at any column
struct Rows {
  const float* at;
  int64_t stride;
};

int64_t stride_of_copy(int64_t width) { return padded(width) + kLanes; }

template <class T> Rows rows_of(const T* at, int64_t count, int64_t width, bool in_place, float* copy) {
  if constexpr (sizeof(T) == sizeof(float))
    if (in_place) return {at, width};
  const int64_t stride = stride_of_copy(width);
  for (int64_t i = 0; i < count; ++i)
    each(width, [&](int64_t j, int n) { store(copy + i * stride + j, take(at + i * width + j, n)); });
  return {copy, stride};
}

// the adapter in fp32 and the sums of one chunk; rows of whole vectors
struct Sums {
  const AdapterCall& call;
  int64_t ranks, wide_ranks, wide_r, wide_k, wide_n;
  Scratch memory;
  float *a, *shift, *b, *low, *d_low, *low_pairs, *d_low_pairs, *d_a, *d_shift, *d_b, *x, *dy;

  explicit Sums(const AdapterCall& c)
      : call(c), ranks(c.parts * c.r), wide_ranks(padded(ranks)), wide_r(padded(c.r)), wide_k(padded(c.k)),
        wide_n(padded(c.n)),
        memory(c.k * wide_ranks + wide_ranks + c.parts * c.n * wide_r + kBlock * (wide_ranks + c.parts * wide_r) +
               kBlock / 2 * (wide_ranks + c.parts * wide_r) + ranks * wide_k + c.parts * wide_r + ranks * wide_n +
               kBlock * (stride_of_copy(c.k) + stride_of_copy(c.width)) + 12 * 16) {
    a = memory.take(c.k * wide_ranks), shift = memory.take(wide_ranks), b = memory.take(c.parts * c.n * wide_r);
    low = memory.take(kBlock * wide_ranks), d_low = memory.take(kBlock * c.parts * wide_r);
    low_pairs = memory.take(kBlock / 2 * wide_ranks), d_low_pairs = memory.take(kBlock / 2 * c.parts * wide_r);
    d_a = memory.take(ranks * wide_k), d_shift = memory.take(c.parts * wide_r), d_b = memory.take(ranks * wide_n);
    x = memory.take(kBlock * stride_of_copy(c.k)), dy = memory.take(kBlock * stride_of_copy(c.width));
  }

  template <class T> void read_adapter() {
    const T *from_a = static_cast<const T*>(call.a), *from_b = static_cast<const T*>(call.b);
    const T* from_shift = static_cast<const T*>(call.shift);
    for (int64_t i = 0; i < ranks; ++i) {
      shift[i] = static_cast<float>(from_shift[i]);
      for (int64_t j = 0; j < call.k; ++j) a[j * wide_ranks + i] = static_cast<float>(from_a[i * call.k + j]);
    }
    for (int64_t i = 0; i < call.parts * call.n; ++i)
      for (int64_t j = 0; j < call.r; ++j) b[i * wide_r + j] = static_cast<float>(from_b[i * call.r + j]);
  }

  void add(const Rows& of_x, const Rows& of_dy, int64_t count) {
    const int64_t r = call.r, across = call.parts * wide_r;
    for (int64_t i = 0; i < count; ++i) std::copy(shift, shift + wide_ranks, low + i * wide_ranks);
    product_of_rows(count, ranks, call.k, of_x.at, of_x.stride, 1, a, wide_ranks, low, wide_ranks, true);
    for (int64_t part = 0; part < call.parts; ++part) {
      const float* dy_part = of_dy.at + call.first[part];
      float* d_low_part = d_low + part * wide_r;
      product_of_rows(count, r, call.n, dy_part, of_dy.stride, 1, b + part * call.n * wide_r, wide_r, d_low_part, across,
                      false);
      product_of_rows(r, call.k, count, d_low_part, 1, across, of_x.at, of_x.stride, d_a + part * r * wide_k, wide_k,
                      true);
      product_of_rows(r, call.n, count, low + part * r, 1, wide_ranks, dy_part, of_dy.stride, d_b + part * r * wide_n,
                      wide_n, true);
    }
    add_shift(count);
  }

  void add_shift(int64_t count) {
    const int64_t across = call.parts * wide_r;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < across; j += kLanes) store(d_shift + j, load(d_shift + j) + load(d_low + i * across + j));
  }

#ifdef __AVX512BF16__
  // the adapter as pairs of neighbors in the sums over K and n
  void read_pairs_of_adapter() {
    const BFloat16* from_b = static_cast<const BFloat16*>(call.b);
    const Pair* from_a = static_cast<const Pair*>(call.a);
    for (int64_t i = 0; i < ranks; ++i) {
      shift[i] = static_cast<float>(static_cast<const BFloat16*>(call.shift)[i]);
      for (int64_t j = 0; j < call.k / 2; ++j) pairs(a)[j * wide_ranks + i] = from_a[i * (call.k / 2) + j];
    }
    for (int64_t i = 0; i < call.parts * call.n; i += 2)
      for (int64_t j = 0; j < call.r; ++j) {
        const BFloat16* at = from_b + i * call.r + j;
        pairs(b)[i / 2 * wide_r + j] = at[0].x | static_cast<uint32_t>(at[call.r].x) << 16;
      }
  }

  static Pair* pairs(float* p) { return reinterpret_cast<Pair*>(p); }

  // rows of `width` values as pairs of rows, in rows of stride_of_copy
  static void copy_pairs(const BFloat16* from, int64_t count, int64_t width, Pair* to) {
    for (int64_t i = 0; i < count; i += 2, to += stride_of_copy(width))
      each(width, [&](int64_t j, int n) {
        const BFloat16* at = from + i * width + j;
        store(to + j, paired(halves(at, n), i + 1 < count ? halves(at + width, n) : Words{}));
      });
  }

  // as `add`, with low and d_low rounded to bf16 for the second products: twice as many terms an instruction
  void add_pairs(const BFloat16* of_x, const BFloat16* of_dy, int64_t count) {
    const int64_t r = call.r, across = call.parts * wide_r, half = (count + 1) / 2;
    const int64_t stride_x = stride_of_copy(call.k), stride_dy = stride_of_copy(call.width);
    copy_pairs(of_x, count, call.k, pairs(x)), copy_pairs(of_dy, count, call.width, pairs(dy));
    for (int64_t i = 0; i < count; ++i) std::copy(shift, shift + wide_ranks, low + i * wide_ranks);
    product_of_rows(count, ranks, call.k / 2, pairs_of(of_x), call.k / 2, 1, pairs(a), wide_ranks, low, wide_ranks, true);
    for (int64_t part = 0; part < call.parts; ++part)
      product_of_rows(count, r, call.n / 2, pairs_of(of_dy + call.first[part]), call.width / 2, 1,
                      pairs(b) + part * call.n / 2 * wide_r, wide_r, d_low + part * wide_r, across, false);
    pairs_of_rows(low, count, wide_ranks, pairs(low_pairs)), pairs_of_rows(d_low, count, across, pairs(d_low_pairs));
    for (int64_t part = 0; part < call.parts; ++part) {
      product_of_rows(r, call.k, half, pairs(d_low_pairs) + part * wide_r, 1, across, pairs(x), stride_x,
                      d_a + part * r * wide_k, wide_k, true);
      product_of_rows(r, call.n, half, pairs(low_pairs) + part * r, 1, wide_ranks, pairs(dy) + call.first[part], stride_dy,
                      d_b + part * r * wide_n, wide_n, true);
    }
    add_shift(count);
  }
#endif

  // d_a [R, K], d_shift [R], d_b [P, n, r]
  void write(float* to) const {
    for (int64_t i = 0; i < ranks; ++i, to += call.k) std::copy(d_a + i * wide_k, d_a + i * wide_k + call.k, to);
    for (int64_t i = 0; i < ranks; ++i) *to++ = d_shift[i / call.r * wide_r + i % call.r];
    for (int64_t part = 0; part < call.parts; ++part)
      for (int64_t j = 0; j < call.n; ++j)
        for (int64_t i = 0; i < call.r; ++i) *to++ = d_b[(part * call.r + i) * wide_n + j];
  }
};

// whether rows are whole pairs, and the processor multiplies those
template <class T> bool has_pairs_of(const AdapterCall& call) {
#ifdef __AVX512BF16__
  return sizeof(T) == sizeof(BFloat16) && (call.k | call.width | call.n) % 2 == 0;
#else
  return static_cast<void>(call), false;
#endif
}

template <class T> void chunks_of(const AdapterCall& call, int64_t begin, int64_t end) {
  Sums sums(call);
  const bool has_pairs = has_pairs_of<T>(call);
#ifdef __AVX512BF16__
  if (has_pairs) sums.read_pairs_of_adapter();
#endif
  if (!has_pairs) sums.read_adapter<T>();
  const int64_t size = sums.ranks * (call.k + 1) + call.parts * call.n * call.r;
  const T *dy = static_cast<const T*>(call.dy), *x = static_cast<const T*>(call.x);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::fill(sums.d_a, sums.d_a + sums.ranks * sums.wide_k, 0.0f);
    std::fill(sums.d_shift, sums.d_shift + call.parts * sums.wide_r, 0.0f);
    std::fill(sums.d_b, sums.d_b + sums.ranks * sums.wide_n, 0.0f);
    const int64_t last = (chunk + 1) * call.rows / call.chunks;
    for (int64_t row = chunk * call.rows / call.chunks; row < last; row += kBlock) {
      const int64_t count = std::min(kBlock, last - row);
#ifdef __AVX512BF16__
      if constexpr (sizeof(T) == sizeof(BFloat16))
        if (has_pairs) {
          sums.add_pairs(x + row * call.k, dy + row * call.width, count);
          continue;
        }
#endif
      const Rows of_x = rows_of(x + row * call.k, count, call.k, call.k % kLanes == 0, sums.x);
      const Rows of_dy = rows_of(dy + row * call.width, count, call.width, call.n % kLanes == 0, sums.dy);
      sums.add(of_x, of_dy, count);
    }
    sums.write(call.partial + chunk * size);
  }
}

}  // namespace

void adapter(const AdapterCall& a, int64_t begin, int64_t end) {
  a.real == Real::kFloat ? chunks_of<float>(a, begin, end) : chunks_of<BFloat16>(a, begin, end);
}

}  // namespace upstep::UPSTEP_CAPABILITY
