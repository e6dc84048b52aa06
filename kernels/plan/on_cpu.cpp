// plan on CPU.
#include <algorithm>
#include <new>

#include "order.h"

extern "C" int hg_plan(const int32_t* ids, int64_t pairs, int64_t experts, int32_t* pair_of_row, int32_t* offsets,
                       int32_t* row_of_pair) {
  try {
    const hg::Order order(ids, pairs, experts);
    std::copy(order.pair_of_row.begin(), order.pair_of_row.end(), pair_of_row);
    std::copy(order.row_of_pair.begin(), order.row_of_pair.end(), row_of_pair);
    std::copy_n(order.offsets.begin(), experts + 1, offsets);
    return 0;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
