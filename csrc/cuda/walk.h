// Where an item's weights lie in memory, and which thread has which.

#pragma once

#include "block.h"
#include "work.h"

namespace tl1::gpu {

TL1_DEVICE int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// An item is a rectangle of weights, its rows `width` apart. A thread takes N weights of a row at a
// time: neighbours, in one access of 16 bytes; or, where addresses or lengths do not allow that,
// every `lanes`-th.
template <int N>
struct Walk {
  int64_t offset;  // of the thread's first weight, counted from the tensor's
  int64_t width;
  int row, rows, step;
  int column, columns, lanes;
  int apart;         // from one of the N to the next: 1, or `lanes`, which is more
  int groups;        // of the item
  uint32_t inverse;  // 2^31 over the weights of a group, rounded up; 0 for one group

  TL1_DEVICE Walk(const Row& tensor, const Item& it, Shape shape, bool neighbours) {
    const int64_t inner = tensor.inner;
    int64_t first;
    int row0 = 0, column0 = 0, in_group = 0;
    rows = 1, lanes = THREADS, groups = 1;
    width = tensor.groups * inner;
    if (shape == Shape::chunk) {
      first = it.team * tensor.span;
      columns = smaller(tensor.span, tensor.numel - first);
      in_group = static_cast<int>(tensor.width);
      groups = in_group ? columns / in_group : 0;
    } else {
      const int64_t outer = tensor.outer, span = tensor.span;
      const int64_t teams = shape == Shape::run ? tensor.groups : (width + span - 1) / span;
      const int64_t block = it.team / teams, team = it.team % teams;
      first = block * outer * width + team * span;
      const int across = static_cast<int>(tensor.across);  // pieces side by side
      row0 = it.piece / across * static_cast<int>(tensor.share_rows);
      column0 = it.piece % across * static_cast<int>(tensor.share_columns);
      lanes = static_cast<int>(tensor.lanes);
      rows = smaller(row0 + tensor.share_rows, outer);
      const int of_team = smaller(span, width - team * span);
      columns = smaller(column0 + tensor.share_columns, of_team);
      if (shape == Shape::panel) {
        in_group = static_cast<int>(inner);
        groups = of_team / in_group;
      }
    }
    inverse = groups > 1 ? ((uint32_t(1) << 31) + in_group - 1) / in_group : 0;
    const int lane = thread() & (lanes - 1);
    apart = neighbours ? 1 : lanes;
    row = row0 + thread() / lanes;
    step = THREADS / lanes;
    column = column0 + (neighbours ? lane * N : lane);
    offset = first + row * width + column;
  }

  TL1_DEVICE bool vectors() const { return apart == 1; }
  // The group of a column, of a chunk or a panel, which are narrow.
  TL1_DEVICE int group_of(int column) const { return product_high(2 * column, inverse); }
};

// Goes from N of a thread's weights to the next.
template <int N>
struct Cursor {
  int64_t offset;
  int row, column;

  TL1_DEVICE explicit Cursor(const Walk<N>& w)
      : offset(w.offset), row(w.column < w.columns ? w.row : w.rows), column(w.column) {}
  TL1_DEVICE void next(const Walk<N>& w) {
    column += w.lanes * N;
    offset += w.lanes * N;
    if (column >= w.columns) {
      const int first = w.column;
      offset += w.step * w.width - (column - first);
      column = first;
      row += w.step;
    }
  }
};

}  // namespace tl1::gpu
