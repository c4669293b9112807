// Host code for NumPy arrays: the sampler of block masks, connected components, and information about the build.
//
// The sampler follows dinov2/data/masking_reference.py draw by draw: the same seed gives the same bits in both.
// Compile with -ffp-contract=off on targets with fused multiply-add, so that the arithmetic is the same too.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "common/cpu_target.h"
#include "union_find/union_find.h"

namespace py = pybind11;

namespace {

// SplitMix64 (Steele, Lea, Flood, 2014): 64 bits of state, the same sequence on every platform.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // A double between low and high; high may be the smaller.
  double uniform(double low, double high) {
    return low + (high - low) * (static_cast<double>(next() >> 11) * 0x1p-53);
  }

  // An integer in [0, bound), bound < 2^31.
  std::int64_t below(std::int64_t bound) {
    return static_cast<std::int64_t>(((next() >> 32) * static_cast<std::uint64_t>(bound)) >> 32);
  }

 private:
  std::uint64_t state_;
};

struct BlockSampler {
  std::int64_t height, width;
  std::int64_t min_patches, max_patches;
  double min_log_aspect, max_log_aspect;
  SplitMix64 random;

  static constexpr int kAttempts = 10;

  // Masks at most `count` cells of `mask`, an all-false [height, width] grid.
  void fill(bool* mask, std::int64_t count) {
    std::int64_t masked = 0;
    while (masked < count) {
      const std::int64_t added = add_block(mask, std::min(count - masked, max_patches));
      if (added == 0) break;
      masked += added;
    }
  }

  // Masks one block that adds between 1 and `cap` cells; returns how many, or 0 if every attempt failed.
  std::int64_t add_block(bool* mask, std::int64_t cap) {
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const double area = random.uniform(static_cast<double>(min_patches), static_cast<double>(cap));
      const double aspect = std::exp(random.uniform(min_log_aspect, max_log_aspect));
      const auto h = static_cast<std::int64_t>(std::nearbyint(std::sqrt(area * aspect)));
      const auto w = static_cast<std::int64_t>(std::nearbyint(std::sqrt(area / aspect)));
      if (h >= height || w >= width) continue;
      const std::int64_t top = random.below(height - h + 1);
      const std::int64_t left = random.below(width - w + 1);

      bool* block = mask + top * width + left;
      const std::int64_t added = h * w - count_masked(block, h, w);
      if (added == 0 || added > cap) continue;
      for (std::int64_t row = 0; row < h; ++row) std::fill_n(block + row * width, w, true);
      return added;
    }
    return 0;
  }

  std::int64_t count_masked(const bool* block, std::int64_t h, std::int64_t w) const {
    std::int64_t masked = 0;
    for (std::int64_t row = 0; row < h; ++row) {
      masked += std::count(block + row * width, block + row * width + w, true);
    }
    return masked;
  }
};

py::array_t<bool> sample_block_masks(std::int64_t height, std::int64_t width,
                                     const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>& counts,
                                     std::uint64_t seed, std::int64_t min_patches, std::int64_t max_patches,
                                     double min_log_aspect, double max_log_aspect) {
  const std::int64_t num_masks = counts.size();
  py::array_t<bool> masks({num_masks, height, width});
  bool* cells = masks.mutable_data();
  const std::int64_t* count = counts.data();
  {
    const py::gil_scoped_release other_threads_may_run;
    std::fill_n(cells, num_masks * height * width, false);
    BlockSampler sampler{height, width, min_patches, max_patches, min_log_aspect, max_log_aspect, SplitMix64(seed)};
    for (std::int64_t i = 0; i < num_masks; ++i) sampler.fill(cells + i * height * width, count[i]);
  }
  return masks;
}

using Edges = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

template <typename Node>
void join(py::array_t<Node, py::array::c_style>& parent, const Edges& first, const Edges& second) {
  const std::int64_t num_nodes = parent.size(), num_edges = first.size();
  if (second.size() != num_edges) throw std::invalid_argument("first and second must be of one length");
  Node* parents = parent.mutable_data();
  const std::int64_t *a = first.data(), *b = second.data();
  const py::gil_scoped_release other_threads_may_run;
  const auto outside = [num_nodes](std::int64_t node) { return node < 0 || node >= num_nodes; };
  if (std::any_of(a, a + num_edges, outside) || std::any_of(b, b + num_edges, outside)) {
    throw std::out_of_range("nodes of edges must lie in [0, number of nodes)");
  }
  join_components(parents, a, b, num_edges);
}

template <typename Node>
void label(py::array_t<Node, py::array::c_style>& parent) {
  const std::int64_t num_nodes = parent.size();
  Node* parents = parent.mutable_data();
  const py::gil_scoped_release other_threads_may_run;
  label_components(parents, num_nodes);
}

template <typename Node>
void define_components(py::module_& module) {
  module.def("join_components", &join<Node>, py::arg("parent").noconvert(), py::arg("first"), py::arg("second"),
             "Join nodes [E] with nodes [E], in place in parent [N]; see dinov2.curate.components.");
  module.def("label_components", &label<Node>, py::arg("parent").noconvert(),
             "Make parent [N], in place, the lowest node of each node's component.");
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<std::int64_t>(__cplusplus);
  info["cpu_target"] = name_of(cpu_target());
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host code over NumPy arrays: block masks, connected components and build information.";
  module.def("sample_block_masks", &sample_block_masks, py::arg("height"), py::arg("width"), py::arg("counts"),
             py::kw_only(), py::arg("seed"), py::arg("min_patches"), py::arg("max_patches"),
             py::arg("min_log_aspect"), py::arg("max_log_aspect"),
             "Block masks, bool [len(counts), height, width]; arguments are checked by dinov2.data.sample_block_masks.");
  define_components<std::uint32_t>(module);
  define_components<std::int64_t>(module);
  module.def("build_info", &build_info, "Compiler, C++ standard, and the variant of the CPU kernels that runs on this processor.");
}
