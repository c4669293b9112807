// An image is processed row by row, in memory that stays in the first-level cache: a row is unpacked into three rows of
// levels, each step goes over them, and the result is normalised and stored. With a contrast jitter, all rows first go
// through the steps before it, for the mean luma. A blur filters each row horizontally and keeps the last nine rows.
#include "photometric/cpu_kernels.h"

#include "photometric/pixels.h"

namespace CPU_TARGET {

constexpr int kTaps = 2 * kReach + 1;
constexpr int kMargin = 16;  // levels before and after a row: a vector of the widest target, and the reach of the blur

// Three rows of levels, one for each channel, each with its margins.
struct Rows {
  float* first;
  int64_t pitch;
  float* channel(int c) const { return first + c * pitch + kMargin; }
  Rows after(int rows) const { return {first + rows * 3 * pitch, pitch}; }
};

ALWAYS_INLINE vec<float> clip(vec<float> x) {
  return minimum(broadcast(255.f), maximum(broadcast(0.f), x));
}

ALWAYS_INLINE vec<float> luma(const Pixels& x) { return 0.299f * x.red + 0.587f * x.green + 0.114f * x.blue; }

// Replaces all pixels of a row, and some of its margin, which is not used, with body(pixels).
template <class Body>
ALWAYS_INLINE void for_each_pixel(const Rows& rows, int64_t W, Body body) {
  float *red = rows.channel(0), *green = rows.channel(1), *blue = rows.channel(2);
  for (int64_t x = 0; x < W; x += lanes<float>) {
    const Pixels result = body(Pixels{load(red + x), load(green + x), load(blue + x)});
    store(red + x, result.red);
    store(green + x, result.green);
    store(blue + x, result.blue);
  }
}

// Moves levels away from a vector of grays by a factor.
ALWAYS_INLINE Pixels away_from(vec<float> gray, float factor, const Pixels& x) {
  const vec<float> rest = (1 - factor) * gray;
  return {clip(factor * x.red + rest), clip(factor * x.green + rest), clip(factor * x.blue + rest)};
}

// Turns the hue by some sixths of the circle, between -3 and 3. With hue, value and chroma as in HSV, a channel equals
// the value within a sixth of its own hue on either side, and falls to value - chroma over the next sixth.
ALWAYS_INLINE Pixels turn_hue(const Pixels& x, float turn) {
  const vec<float> value = maximum(x.red, maximum(x.green, x.blue));
  const vec<float> least = minimum(x.red, minimum(x.green, x.blue)), chroma = value - least;
  const vec<float> inverse = 1 / (chroma > 0 ? chroma : broadcast(1.f));
  const vec<float> from_red = (x.green - x.blue) * inverse, from_green = 2 + (x.blue - x.red) * inverse;
  const vec<float> from_blue = (x.red - x.green) * inverse - 2;
  vec<float> hue = turn + (value == x.red ? from_red : value == x.green ? from_green : from_blue);  // -6 to 6
  hue = hue > 3 ? hue - 6 : hue < -3 ? hue + 6 : hue;
  const auto channel = [&](vec<float> offset) {
    const vec<float> distance = maximum(offset, -offset);  // at most 5; the other way round is 6 - distance
    const vec<float> share = maximum(2 - distance, distance - 4);
    return chroma * minimum(broadcast(1.f), maximum(broadcast(0.f), share)) + least;
  };
  return {channel(hue), channel(hue - 2), channel(hue + 2)};
}

template <bool backwards>
ALWAYS_INLINE void unpack_row(const uint8_t* bytes, int64_t W, const Rows& rows) {
  for (int64_t x = 0; x < W; x += lanes<float>) {
    const Pixels pixels = unpack<backwards>(bytes + 3 * (backwards ? W - x - lanes<float> : x));
    store(rows.channel(0) + x, pixels.red);
    store(rows.channel(1) + x, pixels.green);
    store(rows.channel(2) + x, pixels.blue);
  }
}

// One image, and the steps for one of its rows.
struct Image {
  const uint8_t* bytes;  // [H, W, 3]
  int64_t W;
  const ImagePlan& plan;
  uint8_t* row_of_bytes;  // a copy with margins, so that vectors may read past its ends
  float mean = 0;         // mean luma, if a contrast jitter needs it

  // Row y, flipped, after the first `steps` steps.
  void recolour(int64_t y, int steps, const Rows& rows) const {
    memcpy(row_of_bytes, bytes + y * W * 3, W * 3);
    plan.flip ? unpack_row<true>(row_of_bytes, W, rows) : unpack_row<false>(row_of_bytes, W, rows);
    for (int i = 0; i < steps; ++i) {
      const float strength = plan.strength[i];
      switch (plan.step[i]) {
        case Jitter::none: break;
        case Jitter::brightness:
          for_each_pixel(rows, W, [&](const Pixels& x) { return away_from(vec<float>{}, strength, x); });
          break;
        case Jitter::contrast:
          for_each_pixel(rows, W, [&](const Pixels& x) { return away_from(broadcast(mean), strength, x); });
          break;
        case Jitter::saturation:
          for_each_pixel(rows, W, [&](const Pixels& x) { return away_from(luma(x), strength, x); });
          break;
        case Jitter::hue:
          for_each_pixel(rows, W, [&](const Pixels& x) { return turn_hue(x, 6 * strength); });
          break;
      }
    }
  }
};

float mean_luma(const Image& image, int64_t H, int steps, const Rows& rows) {
  double total = 0;
  for (int64_t y = 0; y < H; ++y) {
    image.recolour(y, steps, rows);
    vec<float> sum = {};
    for_each_vector<float>(0, image.W, [&](int64_t x, auto part) {
      const Pixels pixels{load(rows.channel(0) + x), load(rows.channel(1) + x), load(rows.channel(2) + x)};
      sum += zero_outside(luma(pixels), part);
    });
    total += sum_of_lanes(sum);
  }
  return static_cast<float>(total / static_cast<double>(H * image.W));
}

// The pixel that replaces one outside the image: -1 becomes 1, size becomes size - 2, and so on.
inline int64_t reflect(int64_t place, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1), rest = (place % period + period) % period;
  return rest < size ? rest : period - rest;
}

// from [3, W] filtered along its rows, whose margins are filled first.
void blur_along(const Rows& from, int64_t W, const float* weight, const Rows& to) {
  for (int c = 0; c < 3; ++c) {
    float *in = from.channel(c), *out = to.channel(c);
    for (int64_t k = 1; k <= kReach; ++k) {
      in[-k] = in[reflect(-k, W)];
      in[W - 1 + k] = in[reflect(W - 1 + k, W)];
    }
    for (int64_t x = 0; x < W; x += lanes<float>) {
      vec<float> sum = weight[0] * load(in + x);
#pragma GCC unroll 4
      for (int k = 1; k <= kReach; ++k) sum += weight[k] * (load(in + x - k) + load(in + x + k));
      store(out + x, sum);
    }
  }
}

// Solarised and normalised levels(c, x) of one row, stored into the three planes of y.
template <class Y, class Levels>
ALWAYS_INLINE void finish(const ImagePlan& plan, int64_t W, Y* y, int64_t plane, Levels levels) {
  for (int c = 0; c < 3; ++c) {
    for_each_vector<float>(0, W, [&](int64_t x, auto part) {
      const vec<float> level = levels(c, x);
      const vec<float> solarised = level >= plan.threshold ? 255 - level : level;
      store(y + c * plane + x, solarised * plan.scale[c] + plan.shift[c], part);
    });
  }
}

template <class Y>
void photometric(const uint8_t* bytes, int64_t H, int64_t W, const ImagePlan& plan, float* scratch, Y* y) {
  const int64_t pitch = kMargin + (W + 15) / 16 * 16 + kMargin;
  const Rows rows{scratch + pitch, pitch}, blurred = rows.after(1);
  Image image{bytes, W, plan, reinterpret_cast<uint8_t*>(scratch) + 3 * kMargin};
  for (int i = 0; i < plan.steps; ++i) {
    if (plan.step[i] == Jitter::contrast) image.mean = mean_luma(image, H, i, rows);
  }

  int64_t known = 0;  // number of rows that are blurred horizontally; row r is at r % kTaps
  for (int64_t row = 0; row < H; ++row, y += W) {
    if (!plan.blur) {
      image.recolour(row, plan.steps, rows);
      finish(plan, W, y, H * W, [&](int c, int64_t x) { return load(rows.channel(c) + x); });
      continue;
    }
    for (; known < H && known <= row + kReach; ++known) {
      image.recolour(known, plan.steps, rows);
      blur_along(rows, W, plan.weight, blurred.after(known % kTaps));
    }
    const float* above_and_below[kTaps];
    for (int k = 0; k < kTaps; ++k) above_and_below[k] = blurred.after(reflect(row + k - kReach, H) % kTaps).channel(0);
    finish(plan, W, y, H * W, [&](int c, int64_t x) {
      const float* const* middle = above_and_below + kReach;
      x += c * pitch;
      vec<float> sum = plan.weight[0] * load(middle[0] + x);
#pragma GCC unroll 4
      for (int k = 1; k <= kReach; ++k) sum += plan.weight[k] * (load(middle[-k] + x) + load(middle[k] + x));
      return sum;
    });
  }
}

#define INSTANTIATE(Y) template void photometric(const uint8_t*, int64_t, int64_t, const ImagePlan&, float*, Y*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace CPU_TARGET
