// Soft-target cross-entropy on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work on one
// tile of a row; the definition is dinov2_kernels/cross_entropy/reference.py.
//
// Student rows with the same teacher rows form a group, and a thread takes a group: a tile of each teacher row is
// exponentiated once for all its student rows. Forward sums are online, tile by tile: every logit is read once.
//
// Bytes: forward reads student and teacher logits once, and a shared teacher row once for every 8 student rows.
// Backward reads the same and writes the student's gradient. Nothing else is larger than a tile or [N].

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/huge_pages.h"
#include "common/teacher_rows.h"
#include "cross_entropy/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kStudents = 8;     // in a group, at most: with small groups, threads get equal shares of work
constexpr int64_t kGrain = 1 << 15;  // logits below which a second thread does not pay

template <class Body>
void dispatch(ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
  }
}

// Calls body<X, Y>() with the C++ types of student and teacher; both are float64, or none is.
template <class Body>
void dispatch(const Tensor& student, const Tensor& teacher, const Body& body) {
  dispatch(student.scalar_type(), "student_logits", [&]<class X>() {
    dispatch(teacher.scalar_type(), "teacher_logits", [&]<class Y>() {
      if constexpr (std::is_same_v<accumulate_t<X>, accumulate_t<Y>>) {
        body.template operator()<X, Y>();
      } else {
        STD_TORCH_CHECK(false, "teacher_logits: expected float64 beside float64 student_logits, and only there");
      }
    });
  });
}

template <class X>
const X* pointer(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}

// ---- groups of student rows with the same teacher rows

struct Teacher {
  int64_t row;
  int64_t times;  // that a student row has this teacher row
};

struct Group {
  std::vector<int64_t> students;
  std::vector<Teacher> teachers;
};

// index [N, J] holds which of M teacher rows each student row has; without it, student row n has teacher row n.
std::vector<Group> make_groups(int64_t N, int64_t M, const OptionalTensor& index) {
  std::vector<Group> groups;
  if (!index) {
    for (int64_t n = 0; n < N; ++n) groups.push_back({{n}, {{n, 1}}});
    return groups;
  }
  check_teacher_rows(*index, M);
  const int64_t J = index->size(1);
  std::vector<int64_t> rows(pointer<int64_t>(*index), pointer<int64_t>(*index) + N * J), order(N);
  for (int64_t n = 0; n < N; ++n) std::sort(&rows[n * J], &rows[n * J] + J);
  const auto compare = [&](int64_t a, int64_t b) {
    for (int64_t j = 0; j < J; ++j)
      if (rows[a * J + j] != rows[b * J + j]) return rows[a * J + j] < rows[b * J + j] ? -1 : 1;
    return 0;
  };
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return compare(a, b) < 0; });
  for (int64_t i = 0; i < N; ++i) {
    const int64_t n = order[i];
    if (i == 0 || compare(order[i - 1], n) != 0 || groups.back().students.size() == kStudents) {
      groups.emplace_back();
      for (int64_t j = 0; j < J; ++j) {
        std::vector<Teacher>& teachers = groups.back().teachers;
        const int64_t row = rows[n * J + j];
        if (teachers.empty() || teachers.back().row != row) teachers.push_back({row, 0});
        ++teachers.back().times;
      }
    }
    groups.back().students.push_back(n);
  }
  return groups;
}

template <class Body>
void parallel_groups(const std::vector<Group>& groups, int64_t K, const Body& body) {
  const int64_t logits = K * (groups.empty() ? 1 : groups[0].students.size() + groups[0].teachers.size());
  parallel_for(0, groups.size(), std::max<int64_t>(kGrain / logits, 1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) body(g);
  });
}

// Calls body(k, n) for the tiles of K columns.
template <class Body>
void for_tiles(int64_t K, const Body& body) {
  for (int64_t k = 0; k < K; k += kTileColumns) body(k, std::min(kTileColumns, K - k));
}

// ---- forward

// A running sum exp((z - shift) * scale), and other sums that depend on shift in the same way.
template <class A>
struct OnlineSum {
  A shift = std::numeric_limits<A>::lowest();
  double sum = 0;

  // Raises the shift to the maximum of another tile; returns the factor by which the sum so far changes.
  double raise(A largest, double scale) {
    const A raised = std::max(shift, largest);
    const double factor = raised == shift ? 1 : std::exp((static_cast<double>(shift) - raised) * scale);
    shift = raised;
    sum *= factor;
    return factor;
  }
};

template <class X, class Y, class A = accumulate_t<X>>
struct Arguments {
  const X* student;  // [N, K]
  const Y* teacher;  // [M, K]
  const A* bias;     // [K]
  int64_t K;
  A student_scale, teacher_scale;
};

// Loss of the student rows of one group, and norms [2] of rows: maximum, and sum of exponentials relative to it.
template <class X, class Y, class A>
void forward(const Arguments<X, Y>& args, const Group& group, const A* weight, A* loss, A* student_norm,
             A* teacher_norms) {
  const auto largest = ON_CPU_TARGET(largest<X>);
  const auto largest_biased = ON_CPU_TARGET(largest_biased<Y>);
  const auto teacher_exponentials = ON_CPU_TARGET(teacher_exponentials<Y>);
  const auto student_sums = ON_CPU_TARGET(student_sums<X>);
  const auto student_products = ON_CPU_TARGET(student_products<X>);
  const int64_t K = args.K, R = group.students.size(), J = group.teachers.size();
  std::vector<A> e(J * kTileColumns);
  std::vector<OnlineSum<A>> students(R), teachers(J);
  std::vector<double> products(R * J), factors(J), before(J);  // sum_k e_jk (shift_r - x_rk), of student r and teacher j

  for_tiles(K, [&](int64_t k, int64_t n) {
    for (int64_t j = 0; j < J; ++j) {
      const Y* t = args.teacher + group.teachers[j].row * K + k;
      factors[j] = teachers[j].raise(largest_biased(t, n, args.teacher_scale, args.bias + k), 1);
      before[j] = teachers[j].sum;
      teachers[j].sum += teacher_exponentials(t, n, args.teacher_scale, args.bias + k, teachers[j].shift,
                                              &e[j * kTileColumns]);
    }
    for (int64_t r = 0; r < R; ++r) {
      const X* x = args.student + group.students[r] * K + k;
      const double shift = students[r].shift;
      students[r].raise(largest(x, n), args.student_scale);
      const double raised = k == 0 ? 0 : students[r].shift - shift;
      for (int64_t j = 0; j < J; ++j) {
        double& product = products[r * J + j];
        product = product * factors[j] + raised * before[j];
        if (j > 0) {
          product += student_products(x, n, students[r].shift, &e[j * kTileColumns]);
        } else {
          const TileSums sums = student_sums(x, n, args.student_scale, students[r].shift, &e[0]);
          students[r].sum += sums.exponentials;
          product += sums.products;
        }
      }
    }
  });

  for (int64_t r = 0; r < R; ++r) {
    const int64_t student = group.students[r];
    double total = 0;
    for (int64_t j = 0; j < J; ++j) {
      const double distance = products[r * J + j] / teachers[j].sum * args.student_scale;
      total += group.teachers[j].times * (std::log(students[r].sum) + distance);
    }
    loss[student] = total * (weight ? weight[student] : 1);
    student_norm[2 * student] = students[r].shift;
    student_norm[2 * student + 1] = students[r].sum;
  }
  for (int64_t j = 0; j < J; ++j) {
    teacher_norms[2 * j] = teachers[j].shift;
    teacher_norms[2 * j + 1] = teachers[j].sum;
  }
}

// ---- backward

template <class X, class Y, class A>
void backward(const Arguments<X, Y>& args, const Group& group, const A* grad, const A* weight, const A* student_norm,
              const A* teacher_norm, X* dstudent) {
  const auto targets = ON_CPU_TARGET(targets<Y>);
  const auto gradient = ON_CPU_TARGET(gradient<X>);
  const int64_t K = args.K;
  int64_t faced = 0;
  for (const Teacher& teacher : group.teachers) faced += teacher.times;
  A q[kTileColumns];

  for_tiles(K, [&](int64_t k, int64_t n) {
    for (const Teacher& teacher : group.teachers) {
      const A* norm = teacher_norm + 2 * teacher.row;
      targets(args.teacher + teacher.row * K + k, n, args.teacher_scale, args.bias + k, norm[0],
              teacher.times / norm[1], &teacher != &group.teachers[0], q);
    }
    for (const int64_t student : group.students) {
      const A* norm = student_norm + 2 * student;
      const A factor = grad[student] * (weight ? weight[student] : 1) * args.student_scale;
      gradient(args.student + student * K + k, n, args.student_scale, norm[0], factor * faced / norm[1], factor, q,
               dstudent + student * K + k);
    }
  });
}

// ---- operators

template <class X, class Y>
Arguments<X, Y> arguments(const Tensor& student, const Tensor& teacher, const accumulate_t<X>* bias,
                          double student_temperature, double teacher_temperature) {
  using A = accumulate_t<X>;
  return {pointer<X>(student), pointer<Y>(teacher), bias, student.size(1), static_cast<A>(1 / student_temperature),
          static_cast<A>(1 / teacher_temperature)};
}

ScalarType accumulation_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A vector in type A; if it is absent, `missing` zeros.
template <class A>
std::vector<A> vector_of(const OptionalTensor& tensor, int64_t missing) {
  if (!tensor) return std::vector<A>(missing, 0);
  const Tensor converted = torch::stable::to(*tensor, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  return {pointer<A>(converted), pointer<A>(converted) + converted.numel()};
}

std::tuple<Tensor, Tensor, Tensor> soft_cross_entropy(const Tensor& student, const Tensor& teacher,
                                                      const OptionalTensor& index, const OptionalTensor& bias,
                                                      const OptionalTensor& weight, double student_temperature,
                                                      double teacher_temperature) {
  const int64_t N = student.size(0), M = teacher.size(0), K = student.size(1);
  const ScalarType dtype = accumulation_dtype(student);
  Tensor loss = torch::stable::new_empty(student, {N}, dtype);
  Tensor student_norm = torch::stable::new_empty(student, {N, 2}, dtype);
  Tensor teacher_norm = torch::stable::new_zeros(teacher, {M, 2}, dtype);  // teacher rows without a student row stay 0
  const std::vector<Group> groups = make_groups(N, teacher.size(0), index);
  dispatch(student, teacher, [&]<class X, class Y>() {
    using A = accumulate_t<X>;
    const std::vector<A> biases = vector_of<A>(bias, K), weights = vector_of<A>(weight, 0);
    const Arguments<X, Y> args = arguments<X, Y>(student, teacher, biases.data(), student_temperature, teacher_temperature);
    const A* row_weight = weight ? weights.data() : nullptr;
    A *losses = loss.mutable_data_ptr<A>(), *student_norms = student_norm.mutable_data_ptr<A>();
    const int64_t J = index ? index->size(1) : 1;
    std::vector<A> norms(groups.size() * J * 2);
    parallel_groups(groups, K, [&](int64_t g) {
      forward(args, groups[g], row_weight, losses, student_norms, &norms[g * J * 2]);
    });
    A* teacher_norms = teacher_norm.mutable_data_ptr<A>();
    for (size_t g = 0; g < groups.size(); ++g)
      for (size_t j = 0; j < groups[g].teachers.size(); ++j)
        std::copy_n(&norms[(g * J + j) * 2], 2, &teacher_norms[groups[g].teachers[j].row * 2]);
  });
  return {loss, student_norm, teacher_norm};
}

void write_gradient(const Tensor& grad, const Tensor& student, const Tensor& teacher, const OptionalTensor& index,
                    const OptionalTensor& bias, const OptionalTensor& weight, double student_temperature,
                    double teacher_temperature, const Tensor& student_norm, const Tensor& teacher_norm, void* out) {
  const int64_t N = student.size(0), K = student.size(1);
  const std::vector<Group> groups = make_groups(N, teacher.size(0), index);
  dispatch(student, teacher, [&]<class X, class Y>() {
    using A = accumulate_t<X>;
    const std::vector<A> biases = vector_of<A>(bias, K), weights = vector_of<A>(weight, 0);
    const Arguments<X, Y> args = arguments<X, Y>(student, teacher, biases.data(), student_temperature, teacher_temperature);
    const A* row_weight = weight ? weights.data() : nullptr;
    parallel_groups(groups, K, [&](int64_t g) {
      backward(args, groups[g], pointer<A>(grad), row_weight, pointer<A>(student_norm), pointer<A>(teacher_norm),
               static_cast<X*>(out));
    });
  });
}

Tensor soft_cross_entropy_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                   const OptionalTensor& index, const OptionalTensor& bias,
                                   const OptionalTensor& weight, double student_temperature,
                                   double teacher_temperature, const Tensor& student_norm,
                                   const Tensor& teacher_norm) {
  Tensor dstudent = torch::stable::new_empty(student, student.sizes());
  advise_huge_pages(dstudent.mutable_data_ptr(), dstudent.numel() * dstudent.element_size());
  write_gradient(grad, student, teacher, index, bias, weight, student_temperature, teacher_temperature, student_norm,
                 teacher_norm, dstudent.mutable_data_ptr());
  return dstudent;
}

void soft_cross_entropy_backward_(Tensor student, const Tensor& grad, const Tensor& teacher,
                                  const OptionalTensor& index, const OptionalTensor& bias,
                                  const OptionalTensor& weight, double student_temperature,
                                  double teacher_temperature, const Tensor& student_norm,
                                  const Tensor& teacher_norm) {
  write_gradient(grad, student, teacher, index, bias, weight, student_temperature, teacher_temperature, student_norm,
                 teacher_norm, student.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&soft_cross_entropy));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&soft_cross_entropy_backward));
  m.impl("soft_cross_entropy_backward_", TORCH_BOX(&soft_cross_entropy_backward_));
}
