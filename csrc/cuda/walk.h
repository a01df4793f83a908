// Where an item's weights lie in memory, and which thread has which.

#pragma once

#include "block.h"
#include "work.h"

namespace tl1::gpu {

TL1_DEVICE int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// An item is a rectangle of weights: those of `columns` from `column` on, in the rows from `row` on.
struct Part {
  int64_t first, width;  // of the rectangle that the item is a part of; from row to row
  int row = 0, rows = 1, column = 0, columns;
  int groups = 1, in_group = 0;  // of the item, and weights of one in a row: of a chunk, a panel

  TL1_DEVICE Part(const Row& tensor, const Item& it) {
    const Shape shape = it.shape();
    if (shape == Shape::chunk) {
      first = it.team * tensor.span;
      width = 0;
      columns = smaller(tensor.span, tensor.numel - first);
      in_group = static_cast<int>(tensor.width);
      groups = in_group ? columns / in_group : 0;
      return;
    }
    const int64_t outer = tensor.outer, span = tensor.span;
    width = tensor.groups * tensor.inner;
    const int teams = static_cast<int>(tensor.in_block);
    const int block = it.team < teams ? 0 : it.team / teams, team = it.team - block * teams;
    first = block * outer * width + team * span;
    const int across = static_cast<int>(tensor.across);  // pieces side by side
    const int down = across == 1 ? it.piece : it.piece / across;
    row = down * static_cast<int>(tensor.share_rows);
    column = (it.piece - down * across) * static_cast<int>(tensor.share_columns);
    rows = smaller(row + tensor.share_rows, outer);
    const int of_team = smaller(span, width - team * span);
    columns = smaller(column + tensor.share_columns, of_team);
    if (shape == Shape::panel) {
      in_group = static_cast<int>(tensor.inner);
      groups = of_team / in_group;
    }
  }
};

// A thread takes N weights of a row at a time: neighbours, in one access of 16 bytes; or, where
// addresses or lengths do not allow that, every `lanes`-th. It takes them in `turns` turns, `stride`
// apart, and that `runs` times.
template <int N>
struct Walk {
  int64_t offset;  // of the thread's first weight, counted from the tensor's
  int64_t stride, jump;
  int turns, runs;
  int column, columns;  // the first weight's, in the item
  int aside;            // columns from turn to turn: 0 where it goes down
  int lanes, step;      // threads side by side, rows of them
  int apart;            // from one of the N to the next: 1, or `lanes`, which is more
  int groups;           // of the item
  uint32_t inverse;     // 2^31 over the weights of a group, rounded up; 0 for one group

  TL1_DEVICE Walk(const Row& tensor, const Part& part, Shape shape, bool neighbours)
      : columns(part.columns), groups(part.groups) {
    lanes = shape == Shape::chunk ? THREADS : static_cast<int>(tensor.lanes);
    inverse = groups > 1 ? static_cast<uint32_t>(tensor.inverse) : 0;
    const int lane = thread() & (lanes - 1), shift = exponent_of(lanes);
    apart = neighbours ? 1 : lanes;
    step = THREADS >> shift;
    const int row = part.row + (thread() >> shift);
    column = part.column + (neighbours ? lane * N : lane);
    offset = part.first + row * part.width + column;
    const int side = lanes * N;
    const int in_row = column < columns ? (columns - column + side - 1) >> exponent_of(side) : 0;
    const int in_column = row < part.rows ? (part.rows - row + step - 1) >> exponent_of(step) : 0;
    const bool goes_aside = in_row > 1;
    turns = goes_aside ? in_row : in_row ? in_column : 0;
    runs = goes_aside ? in_column : 1;
    jump = step * part.width;
    stride = goes_aside ? side : jump;
    aside = goes_aside ? side : 0;
  }

  // The group of a column, of a chunk or a panel, which are narrow.
  TL1_DEVICE int group_of(int column) const { return product_high(2 * column, inverse); }
};

// Goes from turn to turn.
struct Cursor {
  int64_t offset;
  int column, turn = 0;
};

}  // namespace tl1::gpu
