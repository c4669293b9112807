// Sums over tokens that do not depend on the number of threads: each fixed chunk of tokens has a partial sum of its own,
// and these are added in order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(begin, end, sums) for chunks of [0, tokens) with at least `grain` tokens; returns the total [width] of the
// sums, added in the order of the chunks.
template <class Body>
std::vector<double> sum_over_tokens(int64_t tokens, int64_t grain, int64_t width, const Body& body) {
  constexpr int64_t kChunks = 128;  // the maximum number of chunks
  const int64_t size = std::max(grain, ceil_div(tokens, kChunks)), chunks = ceil_div(tokens, size);
  std::vector<double> partial(chunks * width);  // [chunks, width]
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      body(chunk * size, std::min((chunk + 1) * size, tokens), partial.data() + chunk * width);
  });
  std::vector<double> total(width);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < width; ++c) total[c] += partial[chunk * width + c];
  return total;
}
