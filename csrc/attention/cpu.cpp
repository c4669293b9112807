// Attention over packed sequences on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work of
// one thread; the definition is dinov2_kernels/attention/reference.py.
//
// A thread takes some heads of some sequences at a time; the sequences of a small batch are also split by queries. Each
// number is computed by one thread in the same way, so the result is the same for every number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/cpu_kernels.h"
#include "common/huge_pages.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kGrain = 1 << 20;       // multiplications below which a second thread does not pay
constexpr int64_t kShares = 32;           // shares per thread: many, so that no thread waits long for the last
constexpr int64_t kQueriesPerPart = 144;  // queries of a part: enough that packing the keys again costs little

struct Sequence {
  int64_t start, length;
};

// The sequences that have tokens, the longest first: the last thread then finishes a short one, and others wait less.
std::vector<Sequence> sequences_of(const std::optional<Tensor>& cu_seqlens, const std::vector<int64_t>& runs,
                                   int64_t T) {
  std::vector<Sequence> sequences;
  int64_t start = 0;
  const auto add = [&](int64_t length) {
    STD_TORCH_CHECK(length >= 0, "expected sequences of 0 or more tokens, got ", length);
    if (length > 0) sequences.push_back({start, length});
    start += length;
  };
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous(),
                    "cu_seqlens: expected a contiguous tensor of int32");
    const int32_t* offsets = cu_seqlens->const_data_ptr<int32_t>();
    for (int64_t s = 1; s < cu_seqlens->numel(); ++s) add(offsets[s] - offsets[s - 1]);
  } else {
    STD_TORCH_CHECK(runs.size() % 2 == 0, "runs: expected (count, length, ...), got ", runs.size(), " numbers");
    for (size_t run = 0; run < runs.size(); run += 2) {
      for (int64_t s = 0; s < runs[run]; ++s) add(runs[run + 1]);
    }
  }
  STD_TORCH_CHECK(start == T, "the sequences have ", start, " tokens, but q has ", T);
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.length > b.length; });
  return sequences;
}

bool is_much(const std::vector<Sequence>& sequences, int64_t H, int64_t D) {
  int64_t multiplications = 0;
  for (const Sequence& sequence : sequences) multiplications += sequence.length * sequence.length * H * D;
  return multiplications > kGrain;
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Calls body(index, workspace) for each index in [0, n). A thread that has finished its share takes the next one.
template <class Body>
void share(int64_t n, int64_t workspace_bytes, bool parallel, const Body& body) {
  const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
  const int64_t share = std::max<int64_t>(1, n / (threads * kShares));
  std::atomic<int64_t> next = 0;
  parallel_for(0, n, parallel ? 1 : n, [&](int64_t, int64_t) {
    const std::unique_ptr<void, Free> workspace(::operator new(workspace_bytes, std::align_val_t(64)));
    for (int64_t begin; (begin = next.fetch_add(share)) < n;) {
      for (int64_t index = begin; index < std::min(begin + share, n); ++index) body(index, workspace.get());
    }
  });
}

// The tokens of head h from `start` on.
template <class X>
Tokens<const X> tokens(const Tensor& x, int64_t start, int64_t h) {
  return {static_cast<const X*>(x.const_data_ptr()) + start * x.stride(0) + h * x.stride(1), x.stride(0)};
}

template <class X>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Sequence>& sequences, float scale,
             X* out, float* lse) {
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2), heads = H * sequences.size();
  if (heads == 0) return;
  const auto kernel = ON_CPU_TARGET(attention_forward<X>);
  const int64_t longest = sequences[0].length;
  const bool whole = heads >= 4 * torch::stable::get_num_threads();
  const int64_t queries = whole ? longest : kQueriesPerPart, parts = (longest + queries - 1) / queries;
  const int64_t workspace_bytes = ON_CPU_TARGET(attention_forward_workspace<X>)(longest, D);
  const auto head = [&](int64_t index) -> Head<X> {
    const int64_t start = sequences[index / (H * parts)].start, h = index / parts % H;
    return {tokens<X>(q, start, h), tokens<X>(k, start, h), tokens<X>(v, start, h)};
  };
  share(heads * parts, workspace_bytes, is_much(sequences, H, D), [&](int64_t index, void* workspace) {
    const auto [start, N] = sequences[index / (H * parts)];
    const int64_t h = index / parts % H, begin = index % parts * queries, end = std::min(begin + queries, N);
    if (begin >= N) return;
    kernel({N, D, scale}, head(index), head(std::min(index + 1, heads * parts - 1)), begin, end,
           {out + (start * H + h) * D, H * D}, lse + h * T + start, workspace);
  });
}

template <class X>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const float* lse, const std::vector<Sequence>& sequences, float scale, X* dqkv) {
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2), heads = H * sequences.size();
  if (heads == 0) return;
  const auto kernel = ON_CPU_TARGET(attention_backward<X>);
  const int64_t workspace_bytes = ON_CPU_TARGET(attention_backward_workspace<X>)(sequences[0].length, D);
  share(heads, workspace_bytes, is_much(sequences, H, D), [&](int64_t index, void* workspace) {
    const auto [start, N] = sequences[index / H];
    const int64_t h = index % H;
    X* gradients = dqkv + (start * 3 * H + h) * D;
    const auto gradient = [&](int64_t which) { return Tokens<X>{gradients + which * H * D, 3 * H * D}; };
    kernel({N, D, scale}, tokens<X>(grad, start, h), tokens<X>(q, start, h), tokens<X>(k, start, h),
           tokens<X>(v, start, h), tokens<X>(out, start, h), lse + h * T + start, gradient(0), gradient(1),
           gradient(2), workspace);
  });
}

void check(const Tensor& x, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2), name,
                  ": expected the shape of q, [T, H, D]");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(x.numel() == 0 || x.size(2) == 1 || x.stride(2) == 1, name, ": expected a dense last dimension");
}

// Calls body.operator()<X>() with the type of the elements of q.
template <class Body>
void dispatch(const Tensor& q, const Body& body) {
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= kMaxHeadDim, "q: expected heads of width 1 to ", kMaxHeadDim,
                  ", got ", q.size(2));
  switch (q.scalar_type()) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "q: expected float32, bfloat16 or float16");
  }
}

// A result that the kernels write.
Tensor fresh(const Tensor& like, const std::vector<int64_t>& shape) {
  Tensor x = torch::stable::new_empty(like, shape);
  advise_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<Tensor> cu_seqlens, std::vector<int64_t> runs,
                                             double scale) {
  for (const auto& [x, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v")}) check(*x, name, q);
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2);
  const std::vector<Sequence> sequences = sequences_of(cu_seqlens, runs, T);
  Tensor out = fresh(q, {T, H, D}), lse = torch::stable::new_empty(q, {H, T}, ScalarType::Float);
  dispatch(q, [&]<class X>() {
    forward(q, k, v, sequences, scale, static_cast<X*>(out.mutable_data_ptr()), lse.mutable_data_ptr<float>());
  });
  return {out, lse};
}

Tensor attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                          const Tensor& lse, std::optional<Tensor> cu_seqlens, std::vector<int64_t> runs,
                          double scale) {
  for (const auto& [x, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&grad, "grad"),
                                std::pair(&out, "out")}) {
    check(*x, name, q);
  }
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == H * T && lse.is_contiguous(),
                  "lse: expected a contiguous float32 tensor [H, T]");
  const std::vector<Sequence> sequences = sequences_of(cu_seqlens, runs, T);
  Tensor dqkv = fresh(q, {T, 3, H, D});
  dispatch(q, [&]<class X>() {
    backward(grad, q, k, v, out, lse.const_data_ptr<float>(), sequences, scale,
             static_cast<X*>(dqkv.mutable_data_ptr()));
  });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
