// Sums of squares of weights that have just been computed and are in L1 still. They are added side by
// side, in lanes, and the lanes of many groups at once. Included by cpu_kernels.cpp alone.

#pragma once

#include "kernels.h"

#define SIMD _Pragma("omp simd")

namespace tl1 {
inline namespace TL1_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;  // float32 weights in a vector register
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t SUMS = LANES / 2;  // of float64, in a vector register: the lanes of one group

template <class A>
double square_of(A x, double unit) {
  const double scaled = unit * static_cast<double>(x);
  return scaled * scaled;
}

// Whether a few squares may be added in float32, whose range they do not leave. Sums are float64, but
// conversions cost more than additions.
template <class A>
bool in_float(double unit) { return sizeof(A) == sizeof(float) && unit == 1; }

inline void add_square(float x, float& sum) { sum = mul_add(x, x, sum); }

// Adds 4 * N numbers to N sums, the first of them.
template <int64_t N, class T>
void fold_four(T* x) {
  SIMD for (int64_t i = 0; i < N; i++) x[i] = (x[i] + x[i + N]) + (x[i + 2 * N] + x[i + 3 * N]);
}

// Adds the squares of N * ROUNDS weights to SUMS sums, N numbers at a time.
template <int64_t N, int64_t ROUNDS>
void add_few(const float* t, double* sums) {
  alignas(64) float part[N] = {};
  for (int64_t k = 0; k < ROUNDS; k++) {
    SIMD for (int64_t i = 0; i < N; i++) add_square(t[k * N + i], part[i]);
  }
  if constexpr (N == 4 * LANES) fold_four<LANES>(part);
  alignas(64) double wide[LANES];
  SIMD for (int64_t i = 0; i < LANES; i++) wide[i] = static_cast<double>(part[i]);
  SIMD for (int64_t i = 0; i < SUMS; i++) sums[i] += wide[i] + wide[i + SUMS];
}

// Adds the squares of n weights to SUMS sums.
template <class A>
void add_squares(const A* t, int64_t n, double unit, double* sums) {
  int64_t at = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (unit == 1) {
      for (; at + 16 * LANES <= n; at += 16 * LANES) add_few<4 * LANES, 4>(t + at, sums);
      for (; at + 4 * LANES <= n; at += 4 * LANES) add_few<4 * LANES, 1>(t + at, sums);
      for (; at + LANES <= n; at += LANES) add_few<LANES, 1>(t + at, sums);
      if (at == n) return;
      alignas(64) float rest[LANES] = {};
      if (n < LANES) {
        for (int64_t i = 0; i < n; i++) rest[i] = t[i];
      } else {  // a whole vector, some of whose squares have been added
        const float* last = t + n - LANES;
        const int32_t added = static_cast<int32_t>(at - (n - LANES));
        SIMD for (int32_t i = 0; i < LANES; i++) rest[i] = i < added ? 0.0f : last[i];
      }
      add_few<LANES, 1>(rest, sums);
      return;
    }
  }
  alignas(64) double part[4 * SUMS] = {};
  for (; at + 4 * SUMS <= n; at += 4 * SUMS) {
    SIMD for (int64_t i = 0; i < 4 * SUMS; i++) part[i] += square_of(t[at + i], unit);
  }
  for (int64_t i = 0; at + i < n; i++) part[i] += square_of(t[at + i], unit);
  fold_four<SUMS>(part);
  SIMD for (int64_t i = 0; i < SUMS; i++) sums[i] += part[i];
}

constexpr int64_t ROWS_IN_PART = 16;  // rows of a column whose squares may be added in float32

// Adds n partial sums to sums in float64, and leaves them 0.
inline void move_part_to(double* sums, float* part, int64_t n) {
  SIMD for (int64_t i = 0; i < n; i++) {
    sums[i] += static_cast<double>(part[i]);
    part[i] = 0;
  }
}

template <int64_t N>
double tree_sum(const double* x) {
  if constexpr (N == 1) {
    return *x;
  } else {
    return tree_sum<N / 2>(x) + tree_sum<N / 2>(x + N / 2);
  }
}

// Returns the sum of SUMS sums, and leaves them 0. In scalars: a short vector read from a long one
// just written waits for memory.
inline double take_sum(double* sums) {
  const double sum = tree_sum<SUMS>(sums);
  for (int64_t i = 0; i < SUMS; i++) sums[i] = 0;
  return sum;
}

// Sums of the squares of groups that lie one behind the other. `lanes` has room for twice the groups'
// SUMS. Groups with too few weights for lanes of their own are lanes themselves.
template <class A>
void sum_rows(const A* t, int64_t groups, int64_t inner, double unit, double* lanes, double* sums) {
  if (inner < 2 * LANES) {
    for (int64_t g = 0; g < groups; g++) sums[g] = 0;
    for (int64_t i = 0; i < inner; i++) {
      SIMD for (int64_t g = 0; g < groups; g++) sums[g] += square_of(t[g * inner + i], unit);
    }
    return;
  }
  for (int64_t g = 0; g < groups; g++) {
    double* of_group = lanes + g * SUMS;
    for (int64_t i = 0; i < SUMS; i++) of_group[i] = 0;
    add_squares(t + g * inner, inner, unit, of_group);
  }
  // Pairs of lanes are added until each group has one.
  for (int64_t n = groups * SUMS / 2; n >= groups; n /= 2) {
    double* halved = n == groups ? sums : lanes + 2 * n;
    SIMD for (int64_t i = 0; i < n; i++) halved[i] = lanes[2 * i] + lanes[2 * i + 1];
    lanes = halved;
  }
}

}  // namespace
}  // namespace TL1_ISA
}  // namespace tl1
