// The photometric augmentation on CPU: how threads share the images. cpu_kernels.cpp has the work on one image; the
// definition is dinov2_kernels/photometric/reference.py.
//
// Bytes: reads 3 per pixel, and 3 more from the cache for images with a contrast jitter; writes the result once. Scratch
// memory is a dozen rows per thread. One thread does an image, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "common/huge_pages.h"
#include "photometric/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 12;  // pixels below which a second thread does not pay
constexpr int64_t kColumns = 12;     // columns of a plan: flip, four times jitter and strength, grayscale, blur, solarise

ImagePlan read_plan(const float* row, const std::vector<double>& mean, const std::vector<double>& std) {
  ImagePlan plan{};
  plan.flip = row[0] != 0;
  for (int i = 1; i < 9; i += 2) {
    const auto jitter = static_cast<Jitter>(static_cast<int>(row[i]));
    if (jitter == Jitter::none) continue;
    plan.step[plan.steps] = jitter;
    plan.strength[plan.steps++] = jitter == Jitter::hue ? row[i + 1] - std::nearbyint(row[i + 1]) : row[i + 1];
  }
  if (row[9] != 0) plan.step[plan.steps++] = Jitter::saturation;  // by a factor of 0

  const double sigma = row[10];
  plan.blur = sigma > 0;
  double sum = 0, weight[kReach + 1];
  for (int k = 0; k <= kReach; ++k) {
    weight[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
    sum += (k == 0 ? 1 : 2) * weight[k];
  }
  for (int k = 0; k <= kReach; ++k) plan.weight[k] = static_cast<float>(weight[k] / sum);

  plan.threshold = row[11];
  for (int c = 0; c < 3; ++c) {
    plan.scale[c] = static_cast<float>(1 / (255 * std[c]));
    plan.shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  return plan;
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};

std::unique_ptr<float, AlignedDelete> zeros(int64_t n) {
  void* memory = ::operator new(n * sizeof(float), std::align_val_t{64});
  float* first = static_cast<float*>(memory);
  std::fill_n(first, n, 0.f);
  return std::unique_ptr<float, AlignedDelete>(first);
}

template <class Y>
void photometric_into(Tensor& out, const Tensor& images, const Tensor& plans, const std::vector<double>& mean,
                      const std::vector<double>& std) {
  const int64_t N = images.size(0), H = images.size(1), W = images.size(2), pixels = H * W;
  const auto kernel = ON_CPU_TARGET(photometric<Y>);
  const uint8_t* image = images.const_data_ptr<uint8_t>();
  const float* rows = plans.const_data_ptr<float>();
  Y* y = static_cast<Y*>(out.mutable_data_ptr());
  advise_huge_pages(y, out.numel() * sizeof(Y));
  parallel_for(0, N, std::max<int64_t>(kGrain / std::max<int64_t>(pixels, 1), 1), [&](int64_t begin, int64_t end) {
    const auto scratch = zeros(photometric_scratch(W));
    for (int64_t n = begin; n < end; ++n) {
      const ImagePlan plan = read_plan(rows + n * kColumns, mean, std);
      kernel(image + n * pixels * 3, H, W, plan, scratch.get(), y + n * pixels * 3);
    }
  });
}

Tensor photometric(const Tensor& images, const Tensor& plan, std::vector<double> mean, std::vector<double> std,
                   ScalarType dtype) {
  Tensor out = torch::stable::new_empty(images, {images.size(0), 3, images.size(1), images.size(2)}, dtype);
  if (out.numel() == 0) return out;
  switch (dtype) {
    case ScalarType::Float: photometric_into<float>(out, images, plan, mean, std); break;
    case ScalarType::BFloat16: photometric_into<bf16>(out, images, plan, mean, std); break;
    case ScalarType::Half: photometric_into<fp16>(out, images, plan, mean, std); break;
    default: STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) { m.impl("photometric", TORCH_BOX(&photometric)); }
