// The tiles of a tree of segments, shared out to threads (the tiles themselves: attention.h).
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "pro_kernels_cpu.h"

namespace pk {
namespace {

struct Tile {
  int64_t segment;
  int64_t start;
  int64_t rows;
};

struct Call {
  Tree tree;
  std::vector<int64_t> parents;
  std::vector<Tile> tiles;     // in the order of the row
  std::vector<int64_t> roots;  // the first tile of each root, and their number

  explicit Call(const TreeAttention& arguments) : tree{arguments, nullptr} {
    for (int64_t s = 0; s < tree.count; ++s) {
      const Segment& own = tree.segment(s);
      int64_t parent = s - 1;
      while (parent >= 0 && tree.segment(parent).last <= own.first) parent = parents[parent];
      parents.push_back(parent);
      if (parent < 0) roots.push_back(int64_t(tiles.size()));
      for (int64_t start = own.first; start < own.end; start += kTileRows) {
        tiles.push_back({s, start, std::min(kTileRows, own.end - start)});
      }
    }
    roots.push_back(int64_t(tiles.size()));
    tree.parents = parents.data();
  }
};

}  // namespace
}  // namespace pk

using namespace pk;

void pk_cpu_tree_attention(const TreeAttention* arguments, int32_t threads) {
  const Call c(*arguments);
  const int64_t heads = c.tree.heads;
  parallel_for(int64_t(c.tiles.size()) * heads, threads, 1, [&](int64_t i) {
    const Tile& tile = c.tiles[i / heads];
    active_isa().attention.forward(c.tree, i % heads, tile.segment, tile.start, tile.rows);
  });
}

// Tiles of one root and sum add to the same gradients, so one thread has them all.
void pk_cpu_tree_attention_backward(const TreeAttention* arguments, int32_t threads) {
  const Call c(*arguments);
  const int64_t sums = c.tree.sums, heads = c.tree.heads / sums;
  parallel_for((int64_t(c.roots.size()) - 1) * sums, threads, 1, [&](int64_t i) {
    const int64_t root = i / sums, first = i % sums * heads;
    for (int64_t j = c.roots[root]; j < c.roots[root + 1]; ++j) {
      const Tile& tile = c.tiles[j];
      for (int64_t head = first; head < first + heads; ++head) {
        active_isa().attention.backward(c.tree, head, tile.segment, tile.start, tile.rows);
      }
    }
  });
}
