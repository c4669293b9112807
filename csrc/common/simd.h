// Vectors of float or double, as wide as the target allows, in the vector extension of GCC and Clang: +, -, *,
// comparisons and ?: work lane by lane, and a * b + c becomes a fused multiply-add where the target has one.
#pragma once

#include <string.h>

#include "common/dtypes.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // false warnings of GCC 12 about its own AVX-512 header
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) static inline
#pragma GCC diagnostic ignored "-Wpsabi"  // about passing vectors in calls; all code here is inlined

namespace CPU_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E, int bytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(bytes)));
};

template <class A>
using vec = typename VectorOf<A, kVectorBytes>::type;

template <class A>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(A));

// As many doubles as vec<A> has lanes, for sums of very many terms.
template <class A>
using wide = typename VectorOf<double, 8 * lanes<A>>::type;

template <class A>
ALWAYS_INLINE vec<A> broadcast(A x) {
  return x - vec<A>{};
}

// ---- A row is several whole vectors and a part of a vector. A loop body is written once, for both.

struct Whole {};
struct Part {
  int n;  // elements, fewer than lanes
};

template <class A, class Body>
ALWAYS_INLINE void for_each_vector(int64_t begin, int64_t end, Body body) {
  for (; begin + lanes<A> <= end; begin += lanes<A>) body(begin, Whole{});
  if (begin < end) body(begin, Part{static_cast<int>(end - begin)});
}

// ---- loads convert to the accumulation dtype

ALWAYS_INLINE vec<float> load(const float* p, Whole = {}) {
  vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}

ALWAYS_INLINE vec<double> load(const double* p, Whole = {}) {
  vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

ALWAYS_INLINE vec<uint32_t> load(const uint32_t* p, Whole = {}) {
  vec<uint32_t> v;
  memcpy(&v, p, sizeof v);
  return v;
}

ALWAYS_INLINE vec<uint32_t> load_16_bits(const void* p) {
#if defined(__AVX512F__)
  return (vec<uint32_t>)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec<uint32_t>)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  VectorOf<uint16_t, kVectorBytes / 2>::type bits;
  memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, vec<uint32_t>);
#endif
}

ALWAYS_INLINE vec<float> load(const bf16* p, Whole = {}) { return (vec<float>)(load_16_bits(p) << 16); }

ALWAYS_INLINE vec<float> load(const fp16* p, Whole = {}) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa move to their positions in a float; the factor changes the exponent's bias from 15 to 127.
  const vec<uint32_t> half = load_16_bits(p), magnitude = (half & 0x7fff) << 13;
  const vec<uint32_t> finite = (vec<uint32_t>)((vec<float>)magnitude * 0x1p112f);
  const vec<uint32_t> inf_or_nan = magnitude | 0x7f800000u;
  return (vec<float>)((half & 0x8000) << 16 | (magnitude >= 0x7c00u << 13 ? inf_or_nan : finite));
#endif
}

// The lanes outside the part hold `fill`.
template <class A>
ALWAYS_INLINE vec<A> load(const A* p, Part part, A fill) {
  vec<A> v = broadcast(fill);
  memcpy(&v, p, part.n * sizeof(A));
  return v;
}

template <class A>
ALWAYS_INLINE vec<A> load(const A* p, Whole whole, A) {
  return load(p, whole);
}

template <class X>
ALWAYS_INLINE vec<accumulate_t<X>> load(const X* p, Part part) {
  X padded[lanes<accumulate_t<X>>] = {};
  memcpy(padded, p, part.n * sizeof(X));
  return load(padded);
}

template <class A, class V>
ALWAYS_INLINE void store(A* p, const V& v, Whole = {}) {
  memcpy(p, &v, sizeof v);
}

template <class A, class V>
ALWAYS_INLINE void store(A* p, const V& v, Part part) {
  memcpy(p, &v, part.n * sizeof(A));
}

// ---- stores of 16-bit floats round to nearest, ties to even

typedef VectorOf<uint16_t, kVectorBytes / 2>::type vec_of_16_bits;

ALWAYS_INLINE vec_of_16_bits round_to(bf16, vec<float> v) {
#if defined(__AVX512BF16__)
  return (vec_of_16_bits)_mm512_cvtneps_pbh(v);
#else
  const vec<uint32_t> bits = (vec<uint32_t>)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : bits | 0x400000) >> 16, vec_of_16_bits);  // a NaN stays NaN
#endif
}

ALWAYS_INLINE vec_of_16_bits round_to(fp16, vec<float> v) {
#if defined(__AVX512F__)
  return (vec_of_16_bits)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vec_of_16_bits)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const vec<uint32_t> bits = (vec<uint32_t>)v, magnitude = bits & 0x7fffffff;
  // The exponent's bias changes from 127 to 15; adding 1/2 shifts a subnormal number into position and rounds it.
  const vec<uint32_t> normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const vec<uint32_t> subnormal = (vec<uint32_t>)((vec<float>)magnitude + 0.5f) - (126u << 23);
  const vec<uint32_t> inf_or_nan = magnitude > 0x7f800000u ? broadcast(0x7e00u) : broadcast(0x7c00u);
  const vec<uint32_t> finite = magnitude < 113u << 23 ? subnormal : normal;
  const vec<uint32_t> half = (bits >> 16 & 0x8000) | (magnitude < 143u << 23 ? finite : inf_or_nan);
  return __builtin_convertvector(half, vec_of_16_bits);
#endif
}

ALWAYS_INLINE void store(bf16* p, vec<float> v, Whole = {}) { store(&p->bits, round_to(bf16{}, v)); }
ALWAYS_INLINE void store(fp16* p, vec<float> v, Whole = {}) { store(&p->bits, round_to(fp16{}, v)); }
ALWAYS_INLINE void store(bf16* p, vec<float> v, Part part) { store(&p->bits, round_to(bf16{}, v), part); }
ALWAYS_INLINE void store(fp16* p, vec<float> v, Part part) { store(&p->bits, round_to(fp16{}, v), part); }

// ---- arithmetic

// The product v, rounded: without this, the compiler may fuse it with the following addition and not round it.
template <class V>
ALWAYS_INLINE V rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// v with zero in the lanes outside the part.
template <class V>
ALWAYS_INLINE V zero_outside(V v, Whole) {
  return v;
}

template <class V>
ALWAYS_INLINE V zero_outside(V v, Part part) {
  V kept = {};
  memcpy(&kept, &v, part.n * sizeof v[0]);
  return kept;
}

// maximum, minimum: a NaN in `a` is ignored, a NaN in `b` stays. any_greater: whether a > b in any lane.
#if defined(__AVX512F__)
ALWAYS_INLINE vec<float> maximum(vec<float> a, vec<float> b) { return _mm512_max_ps(a, b); }
ALWAYS_INLINE vec<double> maximum(vec<double> a, vec<double> b) { return _mm512_max_pd(a, b); }
ALWAYS_INLINE vec<float> minimum(vec<float> a, vec<float> b) { return _mm512_min_ps(a, b); }
ALWAYS_INLINE bool any_greater(vec<float> a, vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
ALWAYS_INLINE bool any_greater(vec<double> a, vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
#elif defined(__AVX2__)
ALWAYS_INLINE vec<float> maximum(vec<float> a, vec<float> b) { return _mm256_max_ps(a, b); }
ALWAYS_INLINE vec<double> maximum(vec<double> a, vec<double> b) { return _mm256_max_pd(a, b); }
ALWAYS_INLINE vec<float> minimum(vec<float> a, vec<float> b) { return _mm256_min_ps(a, b); }
ALWAYS_INLINE bool any_greater(vec<float> a, vec<float> b) { return _mm256_movemask_ps((vec<float>)(a > b)); }
ALWAYS_INLINE bool any_greater(vec<double> a, vec<double> b) { return _mm256_movemask_pd((vec<double>)(a > b)); }
#else
template <class V>
ALWAYS_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ALWAYS_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
template <class V>
ALWAYS_INLINE bool any_greater(V a, V b) {
  const auto greater = a > b;
  bool any = false;
  for (size_t lane = 0; lane < sizeof a / sizeof a[0]; ++lane) any |= greater[lane] != 0;
  return any;
}
#endif

// Shuffles that make vectors of n lanes; `lane` are their numbers.
template <int n, int... lane>
struct Shuffle : Shuffle<n - 1, n - 1, lane...> {};
template <int... lane>
struct Shuffle<0, lane...> {
  static constexpr int n = sizeof...(lane);

  // The halves of a vector of 2 n lanes.
  template <class V>
  ALWAYS_INLINE auto low(V v) {
    return __builtin_shufflevector(v, v, lane...);
  }
  template <class V>
  ALWAYS_INLINE auto high(V v) {
    return __builtin_shufflevector(v, v, (n + lane)...);
  }
  // a0 b0 a1 b1 ... of the lower, or the upper, halves of a and b.
  template <class V>
  ALWAYS_INLINE V zip_low(V a, V b) {
    return __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * n)...);
  }
  template <class V>
  ALWAYS_INLINE V zip_high(V a, V b) {
    return __builtin_shufflevector(a, b, (n / 2 + lane / 2 + lane % 2 * n)...);
  }
};

// All lanes combined: the lower half with the upper half, and again.
template <class V, class Combine>
ALWAYS_INLINE auto combine_lanes(V v, Combine combine) {
  constexpr int n = sizeof v / sizeof v[0];
  if constexpr (n == 1) {
    return v[0];
  } else {
    return combine_lanes(combine(Shuffle<n / 2>::low(v), Shuffle<n / 2>::high(v)), combine);
  }
}

template <class A>
ALWAYS_INLINE A largest_lane(vec<A> v) {
  return combine_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

ALWAYS_INLINE float sum_of_lanes(vec<float> v) {
  return combine_lanes(v, [](auto a, auto b) { return a + b; });
}

// v in the lanes of the part, `fill` in those outside it.
ALWAYS_INLINE vec<float> keep(vec<float> v, Whole, float) { return v; }

ALWAYS_INLINE vec<float> keep(vec<float> v, Part part, float fill) {
  vec<int32_t> lane;
  for (int i = 0; i < lanes<float>; ++i) lane[i] = i;
  return lane < part.n ? v : broadcast(fill);
}

// ---- vectors of doubles

template <class A>
ALWAYS_INLINE wide<A> widen(vec<A> v) {
  return __builtin_convertvector(v, wide<A>);
}

template <class A>
ALWAYS_INLINE double sum_of_lanes(const wide<A>& v) {
  double sum = 0;
  for (int lane = 0; lane < lanes<A>; ++lane) sum += v[lane];
  return sum;
}

template <class A>
ALWAYS_INLINE wide<A> load_wide(const double* p) {
  wide<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}

// ---- sums over rows

// Number of rows whose terms are added in A before their sum is added to a double.
constexpr int kRows = 4;

// sum[c] += the N terms of column c.
template <int N, class A>
ALWAYS_INLINE void add_to(double* sum, const vec<A> (&terms)[N], Whole) {
  vec<A> added = terms[0];
  for (int i = 1; i < N; ++i) added += terms[i];
  store(sum, load_wide<A>(sum) + widen<A>(added));
}

template <int N, class A>
ALWAYS_INLINE void add_to(double* sum, const vec<A> (&terms)[N], Part part) {
  for (int i = 0; i < N; ++i)
    for (int lane = 0; lane < part.n; ++lane) sum[lane] += terms[i][lane];
}

}  // namespace CPU_TARGET
