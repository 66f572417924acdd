// Random views on the CPU: one view at a time, in fp32, in memory that stays in the cache. The formula: kernels/views.
// Every sum has a fixed order, so a view does not depend on the number of threads nor on its neighbors.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "views.h"

namespace upstep {
namespace {

// wider vectors where the processor has them; without fused multiply-add, so every bit stays the same
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define UPSTEP_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define UPSTEP_CLONES
#endif

constexpr int kFlipY = 1, kFlipX = 2, kTranspose = 4;
constexpr int kLanes = 8;  // independent sums, so that the compiler may vectorize them
constexpr int kSlack = 4;  // floats behind a row that may be read and written
constexpr float kLuma[] = {0.2989f, 0.587f, 0.114f}, kThreshold = 128.0f / 255.0f;
typedef float Four __attribute__((vector_size(16)));

inline float unit(float x) { return std::min(std::max(x, 0.0f), 1.0f); }

// What an axis is resized by: output i is the sum of weights[i * taps + t] * input[first[i] + t] over t < count[i]; the
// other weights are 0.
struct Filter {
  std::vector<int> first, count;
  std::vector<float> weights;
  int taps = 0;

  // aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_indices_weights_aa
  void set(int length, int size, bool cubic, bool flip) {
    const double scale = static_cast<double>(length) / size, wide = std::max(scale, 1.0);
    const double reach = (cubic ? 2 : 1) * wide;
    taps = static_cast<int>(std::ceil(2 * reach)) + 1;
    first.resize(size), count.resize(size), weights.assign(size_t(size) * taps, 0.0f);
    std::vector<double> row(taps);
    for (int i = 0; i < size; ++i) {
      const double center = scale * (i + 0.5);
      const int begin = std::max(static_cast<int>(center - reach + 0.5), 0);
      const int end = std::min({static_cast<int>(center + reach + 0.5), length, begin + taps});
      double sum = 0;
      for (int j = begin; j < end; ++j) sum += row[j - begin] = value((j + 0.5 - center) / wide, cubic);
      const int at = flip ? size - 1 - i : i;
      first[at] = begin, count[at] = end - begin;
      for (int j = begin; j < end; ++j) weights[size_t(at) * taps + j - begin] = static_cast<float>(row[j - begin] / sum);
    }
  }

  static double value(double t, bool cubic) {
    t = std::abs(t);
    if (!cubic) return std::max(1 - t, 0.0);
    return t < 1 ? (1.5 * t - 2.5) * t * t + 1 : t < 2 ? (((t - 5) * t + 8) * t - 4) * -0.5 : 0.0;
  }
};

// a row of an image as floats, the channels of a pixel side by side
UPSTEP_CLONES void load_row(const uint8_t* from, int64_t stride_c, int64_t stride_x, int channels, int width, float* to) {
  if (stride_c == 1 && stride_x == channels) {
    for (int i = 0; i < width * channels; ++i) to[i] = from[i];
  } else {
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < channels; ++c) to[x * channels + c] = from[x * stride_x + c * stride_c];
  }
}

// Up to four channels at once: what is too much is written over by the next pixel, or into the slack. N: taps, known when
// compiled; 0: `taps`. Every pixel takes all taps, zeros among them: a loop of one length is a branch that is foreseen.
template <int N> inline void along_four(const float* from, const int* first, const float* weights, int taps, int size,
                                        int channels, float* to) {
  const int count = N ? N : taps;
  for (int x = 0; x < size; ++x) {
    const float *w = weights + int64_t{x} * taps, *at = from + int64_t{first[x]} * channels;
    Four sum = {};
    for (int t = 0; t < count; ++t) {
      Four pixel;
      std::memcpy(&pixel, at + t * channels, sizeof pixel);
      sum += w[t] * pixel;
    }
    std::memcpy(to + int64_t{x} * channels, &sum, sizeof sum);
  }
}

UPSTEP_CLONES void along(const float* from, const int* first, const float* weights, int taps, int size, int channels,
                         float* to) {
  if (channels > 4) {
    for (int x = 0; x < size; ++x) {
      const float *w = weights + int64_t{x} * taps, *at = from + int64_t{first[x]} * channels;
      float* sum = to + int64_t{x} * channels;
      std::fill_n(sum, channels, 0.0f);
      for (int t = 0; t < taps; ++t)
        for (int c = 0; c < channels; ++c) sum[c] += w[t] * at[t * channels + c];
    }
  } else if (taps == 3) {
    along_four<3>(from, first, weights, taps, size, channels, to);
  } else if (taps == 4) {
    along_four<4>(from, first, weights, taps, size, channels, to);
  } else if (taps == 5) {
    along_four<5>(from, first, weights, taps, size, channels, to);
  } else {
    along_four<0>(from, first, weights, taps, size, channels, to);
  }
}

UPSTEP_CLONES void add_row(const float* from, float weight, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] += weight * from[i];
}

UPSTEP_CLONES void clamp_row(float* x, int count, float limit) {
  for (int i = 0; i < count; ++i) x[i] = std::min(std::max(x[i], 0.0f), limit);
}

UPSTEP_CLONES void brightness_row(float* x, int count, float by) {
  for (int i = 0; i < count; ++i) x[i] = unit(by * x[i]);
}

UPSTEP_CLONES void split_row(const float* from, int channels, int width, int64_t plane, float* to) {
  if (channels == 3) {
    float *r = to, *g = to + plane, *b = to + 2 * plane;
    for (int x = 0; x < width; ++x) r[x] = from[3 * x], g[x] = from[3 * x + 1], b[x] = from[3 * x + 2];
  } else {
    for (int c = 0; c < channels; ++c)
      for (int x = 0; x < width; ++x) to[c * plane + x] = from[x * channels + c];
  }
}

UPSTEP_CLONES double sum_row(const float* x, int count) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] += x[i];
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

UPSTEP_CLONES void contrast_row(float* x, int count, float by, float level) {
  for (int i = 0; i < count; ++i) x[i] = unit(by * x[i] + level);
}

UPSTEP_CLONES void saturation_row(float* r, float* g, float* b, int count, float by) {
  for (int i = 0; i < count; ++i) {
    const float other = (1 - by) * (kLuma[0] * r[i] + kLuma[1] * g[i] + kLuma[2] * b[i]);
    r[i] = unit(by * r[i] + other), g[i] = unit(by * g[i] + other), b[i] = unit(by * b[i] + other);
  }
}

// value - chroma * clamp(min(k, 4 - k)), k = (n + h) mod 6
inline float hue_channel(float h, float value, float chroma, float n) {
  float k = h + n;
  k -= 6 * std::floor(k / 6);
  return value - chroma * unit(std::min(k, 4 - k));
}

UPSTEP_CLONES void hue_row(float* r, float* g, float* b, int count, float shift) {
  for (int i = 0; i < count; ++i) {
    const float red = r[i], green = g[i], blue = b[i];
    const float value = std::max(std::max(red, green), blue), chroma = value - std::min(std::min(red, green), blue);
    const float scale = 1 / std::max(chroma, 1e-12f);  // gray pixels: every difference below is 0
    const float last = green == value ? (blue - red) * scale + 2 : (red - green) * scale + 4;
    const float h = (red == value ? (green - blue) * scale : last) + 6 * shift;
    r[i] = hue_channel(h, value, chroma, 5), g[i] = hue_channel(h, value, chroma, 3);
    b[i] = hue_channel(h, value, chroma, 1);
  }
}

UPSTEP_CLONES void gray_row(float* r, float* g, float* b, int count) {
  for (int i = 0; i < count; ++i) r[i] = g[i] = b[i] = kLuma[0] * r[i] + kLuma[1] * g[i] + kLuma[2] * b[i];
}

UPSTEP_CLONES void finish_row(const float* from, int count, float mean, float by, bool solarize, float* to) {
  if (solarize) {
    for (int i = 0; i < count; ++i) to[i] = ((from[i] >= kThreshold ? 1 - from[i] : from[i]) - mean) * by;
  } else {
    for (int i = 0; i < count; ++i) to[i] = (from[i] - mean) * by;
  }
}

int reflected(int i, int size) {
  i = std::abs(i);
  return i < size ? i : 2 * (size - 1) - i;
}

std::vector<float> gaussian(int half, float sigma) {
  std::vector<float> weights(2 * half + 1);
  double sum = 0;
  for (int i = -half; i <= half; ++i) sum += std::exp(-0.5 * i * i / (double{sigma} * sigma));
  for (int i = -half; i <= half; ++i)
    weights[i + half] = static_cast<float>(std::exp(-0.5 * i * i / (double{sigma} * sigma)) / sum);
  return weights;
}

// makes one view after the other
class Maker {
 public:
  explicit Maker(const ViewsCall& call)
      : a(call), size(int64_t{call.height} * call.width), view(size * call.channels), line(call.width + kSlack) {}

  void make(int64_t n) {
    const int32_t* box = a.boxes + n * 6;
    const float* f = a.factors + n * 7;
    const double level = (1 - f[1]) * resize(box, f[0]);
    const bool rgb = a.channels == 3;
    for (int y = 0; y < a.height; ++y) {
      for (int c = 0; c < a.channels; ++c) contrast_row(row(c, y), a.width, f[1], static_cast<float>(level));
      if (rgb) {
        float *r = row(0, y), *g = row(1, y), *b = row(2, y);
        if (f[2] != 1) saturation_row(r, g, b, a.width, f[2]);
        if (f[3] != 0) hue_row(r, g, b, a.width, f[3]);
        if (f[4] != 0) gray_row(r, g, b, a.width);
      }
    }
    if (f[5] > 0 && (a.half_y || a.half_x)) blur(f[5]);
    if (a.real == Real::kFloat) store(static_cast<float*>(a.out), n, f[6] != 0);
    else if (a.real == Real::kHalf) store(static_cast<c10::Half*>(a.out), n, f[6] != 0);
    else store(static_cast<c10::BFloat16*>(a.out), n, f[6] != 0);
  }

 private:
  const ViewsCall& a;
  const int64_t size;
  std::vector<float> view;  // [C, H, W]
  std::vector<float> line, source, ring, sum, other;
  Filter down, across;

  float* row(int c, int y) { return view.data() + c * size + int64_t{y} * a.width; }

  // crop, resize, turn and brightness into `view`; returns the mean of its luma
  double resize(const int32_t* box, float brightness) {
    const int64_t* place = a.places + int64_t{box[0]} * 4;
    const int top = box[1], left = box[2], rows = box[3], columns = box[4], turn = box[5], C = a.channels;
    // an image need not lie in one piece of memory with the first: so as numbers
    const auto* start = reinterpret_cast<const uint8_t*>(reinterpret_cast<intptr_t>(a.pixels) + place[0]) +
                        top * place[2] + left * place[3];
    down.set(rows, a.height, a.cubic, turn & kFlipY), across.set(columns, a.width, a.cubic, turn & kFlipX);
    const int wide = a.width * C, step = wide + kSlack;
    source.assign(size_t(columns + across.taps) * C + kSlack, 0.0f), sum.resize(step), ring.resize(size_t(down.taps) * step);
    double totals[3] = {};
    int done = 0;  // source rows resized along x so far; the last `taps` of them are kept
    for (int i = 0; i < a.height; ++i) {
      const int y = turn & kFlipY ? a.height - 1 - i : i;  // in the order of the source
      const int end = down.first[y] + down.count[y];
      for (done = std::max(done, down.first[y]); done < end; ++done) {
        load_row(start + done * place[2], place[1], place[3], C, columns, source.data());
        float* to = ring.data() + size_t(done % down.taps) * step;
        along(source.data(), across.first.data(), across.weights.data(), across.taps, a.width, C, to);
        if (a.cubic) clamp_row(to, wide, 255);  // between the two passes and after them, as Pillow and torch do on uint8
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int t = 0; t < down.count[y]; ++t)
        add_row(ring.data() + size_t((down.first[y] + t) % down.taps) * step,
                down.weights[size_t(y) * down.taps + t] * (1 / 255.0f), wide, sum.data());
      if (a.cubic) clamp_row(sum.data(), wide, 1);
      brightness_row(sum.data(), wide, brightness);
      split_row(sum.data(), C, a.width, size, row(0, y));
      for (int c = 0; c < C; ++c) totals[C == 3 ? c : 0] += sum_row(row(c, y), a.width);
    }
    if (turn & kTranspose)
      for (int c = 0; c < C; ++c)
        for (int y = 0; y < a.height; ++y)
          for (int x = 0; x < y; ++x) std::swap(row(c, y)[x], row(c, x)[y]);
    if (C != 3) return totals[0] / (double(size) * C);
    return (kLuma[0] * totals[0] + kLuma[1] * totals[1] + kLuma[2] * totals[2]) / double(size);
  }

  void blur(float sigma) {
    const std::vector<float> wx = gaussian(a.half_x, sigma), wy = gaussian(a.half_y, sigma);
    other.resize(size), sum.resize(a.width + 2 * a.half_x);
    for (int c = 0; c < a.channels; ++c) {
      for (int y = 0; y < a.height; ++y) {
        const float* from = row(c, y);
        for (int x = -a.half_x; x < a.width + a.half_x; ++x) sum[x + a.half_x] = from[reflected(x, a.width)];
        float* to = other.data() + int64_t{y} * a.width;
        std::fill_n(to, a.width, 0.0f);
        for (size_t t = 0; t < wx.size(); ++t) add_row(sum.data() + t, wx[t], a.width, to);
      }
      for (int y = 0; y < a.height; ++y) {
        std::fill_n(row(c, y), a.width, 0.0f);
        for (int t = -a.half_y; t <= a.half_y; ++t)
          add_row(other.data() + int64_t{reflected(y + t, a.height)} * a.width, wy[t + a.half_y], a.width, row(c, y));
      }
    }
  }

  template <class T> void store(T* out, int64_t n, bool solarize) {
    out += n * a.channels * size;
    const int patch = a.patch ? a.patch : a.width;
    for (int c = 0; c < a.channels; ++c)
      for (int y = 0; y < a.height; ++y) {
        T* to = out + (a.patch ? int64_t{y / patch} * patch * a.width * a.channels + (c * patch + y % patch) * patch
                               : c * size + int64_t{y} * a.width);
        if constexpr (std::is_same_v<T, float>) {
          for (int x = 0; x < a.width; x += patch, to += int64_t{a.channels} * patch * patch)
            finish_row(row(c, y) + x, patch, a.mean[c], 1 / a.std[c], solarize, to);
        } else {
          finish_row(row(c, y), a.width, a.mean[c], 1 / a.std[c], solarize, line.data());
          for (int x = 0; x < a.width; x += patch, to += int64_t{a.channels} * patch * patch)
            for (int i = 0; i < patch; ++i) to[i] = static_cast<T>(line[x + i]);
        }
      }
  }
};

}  // namespace

void views_cpu(const ViewsCall& call) {
  torch::stable::parallel_for(0, call.count, 1, [&](int64_t begin, int64_t end) {
    Maker maker(call);
    for (int64_t n = begin; n < end; ++n) maker.make(n);
  });
}

}  // namespace upstep
