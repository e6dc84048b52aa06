// The order in which pairs are worked on; see Plan in __init__.py.
#pragma once
#include <cstdint>
#include <vector>

namespace hg {

// Pairs by expert: a counting sort, stable.
struct Order {
  std::vector<int32_t> pair_of_row, row_of_pair, offsets;
  bool good = true;  // false: an id below -1

  Order(const int32_t* ids, int64_t pairs, int64_t experts) : pair_of_row(pairs), row_of_pair(pairs), offsets(experts + 2) {
    for (int64_t p = 0; p < pairs; ++p) {
      good &= ids[p] >= -1;
      ++offsets[bin(ids[p], experts) + 1];
    }
    for (int64_t e = 0; e <= experts; ++e) offsets[e + 1] += offsets[e];
    std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) {
      int32_t at = next[bin(ids[p], experts)]++;
      pair_of_row[at] = int32_t(p);
      row_of_pair[p] = at;
    }
  }
  static int64_t bin(int32_t id, int64_t experts) { return id < 0 || id >= experts ? experts : id; }
};

}  // namespace hg
