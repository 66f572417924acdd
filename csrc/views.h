// Random views as plain pointers: the interface of ops.cpp to views_cpu.cpp. No torch here. See kernels/views.
#pragma once

#include <cstdint>

#include "center_vector.h"

namespace upstep {

struct ViewsCall {
  const uint8_t* pixels;  // what the places count from
  const int64_t* places;  // [B, 4] of each image: offset of its first pixel, strides over channels, rows, columns
  const int32_t* boxes;   // [N, 6] of each view: image, top, left, height, width, turn
  const float* factors;   // [N, 7]
  const float *mean, *std;
  int64_t count;  // N
  int channels, height, width;
  bool cubic;
  int half_y, half_x;  // of the blur
  int patch;           // 0: pictures
  Real real;           // of `out`
  void* out;           // [N, C, H, W], or in the order of patches
};

void views_cpu(const ViewsCall& call);

}  // namespace upstep
