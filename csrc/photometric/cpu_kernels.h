// The photometric augmentation of one image, on one thread: cpu_kernels.cpp, compiled for every CPU target.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

enum class Jitter { none, brightness, contrast, saturation, hue };  // the numbers of a plan's table

constexpr int kMaxSteps = 5;  // four jitters, and grayscale
constexpr int kReach = 4;     // pixels of the blur on either side

// The steps for one image.
struct ImagePlan {
  bool flip;
  int steps;
  Jitter step[kMaxSteps];
  float strength[kMaxSteps];  // a factor, or the turn of the hue in [-0.5, 0.5] circles
  bool blur;
  float weight[kReach + 1];  // weights of the blur, from the middle outwards
  float threshold;           // threshold of solarisation
  float scale[3], shift[3];  // normalised value = level * scale + shift
};

// Scratch memory of a thread for images of this width, in floats, for any target.
constexpr int64_t photometric_scratch(int64_t W) {
  const int64_t row = 16 + (W + 15) / 16 * 16 + 16;  // with a margin of one vector at each end
  return row + (1 + 2 * kReach + 1) * 3 * row;        // bytes of a row; rows of levels: one, and nine blurred ones
}

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  /* image [H, W, 3] to y [3, H, W]; scratch is aligned to 64 bytes. */                                              \
  template <class Y>                                                                                                 \
  void photometric(const uint8_t* image, int64_t H, int64_t W, const ImagePlan& plan, float* scratch, Y* y);         \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
