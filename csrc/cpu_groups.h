// What is measured of groups whose weights a penalty couples: sums side by side, as arrays of each
// number. Included by cpu_kernels.cpp and, through schedule.h, by cpu_step.cpp.

#pragma once

#include "kernels.h"

namespace tl1 {
inline namespace TL1_ISA {

// Arrays of the members of Measured, or of Shrink; [i] is of group, column or lane i.
struct Measures {
  double* of[MEASURES];

  static Measures in(double* numbers, int64_t n) {
    return {{numbers, numbers + n, numbers + 2 * n, numbers + 3 * n}};
  }
  Measures from(int64_t i) const { return {{of[0] + i, of[1] + i, of[2] + i, of[3] + i}}; }

  void clear(int64_t n) const {
    for (double* numbers : of) {
      for (int64_t i = 0; i < n; i++) numbers[i] = 0;
    }
  }

  // Adds what has been measured elsewhere of other weights of group i.
  void add(int64_t i, const Measured& m) const {
    of[0][i] += m.squares;
    of[1][i] += m.sum;
    const double mine = magnitude_of(of[2][i]), other = magnitude_of(m.largest);
    if (other > mine || (other == mine && m.at < of[3][i])) of[2][i] = m.largest, of[3][i] = m.at;
  }
  Measured measured(int64_t i) const { return {of[0][i], of[1][i], of[2][i], of[3][i]}; }
  void put(int64_t i, const Shrink& s) const {
    of[0][i] = s.factor, of[1][i] = s.cut, of[2][i] = s.kept_at, of[3][i] = s.kept;
  }
};

// What of |v| is measured by squares: what is beyond the offset, in the unit. A NaN stays.
inline double beyond(double size, double offset, double unit) {
  return size <= offset ? 0 : unit * (size - offset);
}

// Measures v[i], each at place `at` of its group, into [i], for i in [0, n).
template <class A>
void measure_columns(const A* v, int64_t n, double at, double offset, double unit,
                     const Measures& into) {
  double *squares = into.of[0], *sum = into.of[1], *largest = into.of[2], *place = into.of[3];
  _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {
    const double x = v[i], size = magnitude_of(x), more = beyond(size, offset, unit);
    squares[i] += more * more;
    sum[i] += size;
    const bool larger = size > magnitude_of(largest[i]);
    largest[i] = larger ? x : largest[i];
    place[i] = larger ? at : place[i];
  }
}

// Measures a run of n weights of one group, the first at place `at`. Which of them is the largest is
// looked for only where it matters: where none is beyond the offset.
template <class A>
Measured measure_run(const A* v, int64_t n, double at, double offset, double unit) {
  double squares = 0, sum = 0, largest = 0;
  _Pragma("omp simd reduction(+ : squares, sum) reduction(max : largest)")
  for (int64_t i = 0; i < n; i++) {
    const double size = magnitude_of(static_cast<double>(v[i])), more = beyond(size, offset, unit);
    squares += more * more;
    sum += size;
    largest = size > largest ? size : largest;
  }
  int64_t first = 0;
  if (squares == 0) {
    while (first < n - 1 && magnitude_of(static_cast<double>(v[first])) != largest) first++;
    largest = v[first];
  }
  return {squares, sum, largest, at + static_cast<double>(first)};
}

}  // namespace TL1_ISA
}  // namespace tl1
