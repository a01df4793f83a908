// Where an item's weights lie in memory, and which thread has which.

#pragma once

#include "block.h"
#include "work.h"

namespace tl1::gpu {

TL1_DEVICE int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// a / b, where `inverse` is 2^31 / b, rounded up: for a * b < 2^31. A division would take 20 times as long.
TL1_DEVICE int quotient(int a, int64_t inverse) { return product_high(2 * a, static_cast<uint32_t>(inverse)); }

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

template <int N>
struct Walk;

// Goes from turn to turn.
struct Cursor {
  int64_t offset;
  int turn, left;

  Cursor() = default;
  template <int N>
  TL1_DEVICE explicit Cursor(const Walk<N>& walk)
      : offset(walk.offset), turn(0), left(walk.turns * walk.runs) {}

  TL1_DEVICE bool there() const { return left > 0; }
  template <int N>
  TL1_DEVICE int column(const Walk<N>& walk) const { return walk.column + turn * walk.aside; }
  template <int N>
  TL1_DEVICE void next(const Walk<N>& walk) {
    left--;
    const bool turns_back = ++turn == walk.turns;
    offset += turns_back ? walk.back : walk.stride;
    turn = turns_back ? 0 : turn;
  }
};

// A thread takes N weights of a row at a time: neighbours, in one access of 16 bytes; or, where
// addresses or lengths do not allow that, every `lanes`-th. It takes them in `turns` turns, `stride`
// apart, and that `runs` times, `back` from the last turn to the first of the next.
template <int N>
struct Walk {
  int64_t offset;  // of the thread's first weight, counted from the tensor's
  int64_t stride, back;
  int turns, runs;
  int column, columns;  // the first weight's, in the item
  int aside;            // columns from turn to turn: 0 where it goes down
  int lanes, step;      // threads side by side, rows of them; some threads may be left over
  int down;             // the thread's row of threads
  int apart;            // from one of the N to the next: 1, or `lanes`, which is more
  int groups;           // of the item
  uint32_t inverse;     // 2^31 over the weights of a group, rounded up; 0 for one group

  TL1_DEVICE Walk(const Row& tensor, const Part& part, Shape shape, bool neighbours)
      : columns(part.columns), groups(part.groups) {
    lanes = shape == Shape::chunk ? THREADS : static_cast<int>(tensor.lanes);
    inverse = groups > 1 ? static_cast<uint32_t>(tensor.inverse) : 0;
    apart = neighbours ? 1 : lanes;
    step = shape == Shape::chunk ? 1 : quotient(THREADS, tensor.inverse_lanes);
    down = shape == Shape::chunk ? 0 : quotient(thread_anew(), tensor.inverse_lanes);
    const int lane = thread_anew() - down * lanes, row = part.row + down;
    column = part.column + (neighbours ? lane * N : lane);
    offset = part.first + row * part.width + column;
    const int side = lanes * N;  // all of a row, where there are fewer lanes than threads
    int in_row = column < columns;
    if (in_row && lanes == THREADS) in_row = (columns - column + side - 1) / (THREADS * N);
    int in_column = 0;
    if (down < step && row < part.rows) {
      in_column = step == 1 ? part.rows - row : quotient(part.rows - row + step - 1, tensor.inverse_step);
    }
    const bool goes_aside = in_row > 1;
    turns = goes_aside ? in_row : in_column;
    runs = in_row == 0 ? 0 : goes_aside ? in_column : in_column > 0;
    const int64_t jump = step * part.width;
    stride = goes_aside ? side : jump;
    back = jump - (turns - 1) * stride;
    aside = goes_aside ? side : 0;
  }

  // Calls each(k) for those of the N at a place that are there: of vectors all are.
  template <bool VECTORS, class Each>
  TL1_DEVICE void for_each(const Cursor& at, Each each) const {
    _Pragma("unroll") for (int k = 0; k < N; k++) {
      if (VECTORS || at.column(*this) + k * apart < columns) each(k);
    }
  }

  // The group of a column, of a chunk or a panel, which are narrow.
  TL1_DEVICE int group_of(int column) const { return quotient(column, inverse); }
};

}  // namespace tl1::gpu
