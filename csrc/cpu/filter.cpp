// The column filter of a chunk, shared out to threads (what they do: filter.h).
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "pro_kernels_cpu.h"

namespace pk {
namespace {

int64_t groups(const ColumnFilter& f) {
  return (f.rows + f.group_rows - 1) / f.group_rows;
}

constexpr int64_t kSumRows = 1024;
constexpr int64_t kPartBytes = 8 << 20;  // of W, were it fp32

int64_t padded(int64_t hidden) {  // to whole registers of any instruction set
  return (hidden + 31) / 32 * 32;
}

const FilterProducts& products(const ColumnFilter& f) {
  const FilterKernels& kernels = active_isa().filter;
  const bool pairs = f.dtype == kBFloat16 && f.operand_dtype == kBFloat16;
  return pairs ? kernels.of_bf16 : kernels.products;
}

}  // namespace
}  // namespace pk

using namespace pk;

// By blocks, so that the sum does not depend on the number of threads.
void pk_cpu_filter_centre(const ColumnFilter* f, int32_t threads) {
  const int64_t blocks = (f->columns + kSumRows - 1) / kSumRows;
  std::vector<float> sums(blocks * f->hidden);
  parallel_for(blocks, threads, 1, [&](int64_t i) {
    const int64_t from = i * kSumRows, to = std::min(from + kSumRows, f->columns);
    active_isa().filter.add_operands(*f, from, to, &sums[i * f->hidden]);
  });
  for (int64_t h = 0; h < f->hidden; ++h) {
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += sums[i * f->hidden + h];
    f->centre[h] = float(sum);
  }
}

void pk_cpu_filter_distances(const ColumnFilter* f, int32_t threads) {
  parallel_for(f->columns, threads, 1024,
               [&](int64_t v) { f->sums[v] = active_isa().filter.squared_distance(*f, v); });
}

void pk_cpu_filter_count(const ColumnFilter* f, int32_t threads) {
  parallel_for(f->rows, threads, 8, [&](int64_t i) { active_isa().filter.count_large(*f, i); });
}

void pk_cpu_filter_sums(const ColumnFilter* f, int32_t threads) {
  parallel_for(groups(*f), threads, 1, [&](int64_t i) { active_isa().filter.add_rows(*f, i); });
}

void pk_cpu_filter_compact(const ColumnFilter* f, int32_t threads) {
  parallel_for(groups(*f), threads, 1, [&](int64_t i) { active_isa().filter.compact(*f, i); });
}

// Part by part of W, which all groups then read from a shared cache. Where groups are few, threads
// share the columns of one. The last groups have most to do.
void pk_cpu_filter_hidden_grad(const ColumnFilter* f, int32_t threads) {
  const FilterKernels& kernels = active_isa().filter;
  const int64_t count = groups(*f), width = padded(f->hidden);
  const int64_t pieces = count ? (4 * threads + count - 1) / count : 1;
  const int64_t across = std::max<int64_t>(128, padded((f->hidden + pieces - 1) / pieces));
  const int64_t parts = (f->hidden + across - 1) / across;
  std::vector<float> sums(f->rows * width);
  parallel_for(f->rows, threads, 64,
               [&](int64_t i) { kernels.begin_hidden(*f, i, &sums[i * width]); });
  const int64_t some = std::max<int64_t>(1024, kPartBytes / std::max<int64_t>(1, 4 * f->hidden));
  for (int64_t from = 0; from < f->columns; from += some) {
    parallel_for(count * parts, threads, 1, [&](int64_t i) {
      const int64_t first = i % parts * across;
      const HiddenPiece piece = {count - 1 - i / parts, first, std::min(first + across, f->hidden),
                                 from, from + some};
      products(*f).hidden(*f, piece, sums.data(), width);
    });
  }
  parallel_for(f->rows, threads, 64,
               [&](int64_t i) { kernels.end_hidden(*f, i, &sums[i * width]); });
}

void pk_cpu_filter_weight_grad(const ColumnFilter* f, int32_t threads) {
  const FilterProducts& of = products(*f);
  const int64_t width = padded(f->hidden);
  const int64_t depth = (f->group_rows + of.depth - 1) / of.depth;
  std::vector<char> sides(groups(*f) * depth * width * of.number_size);
  parallel_for(groups(*f), threads, 1,
               [&](int64_t i) { of.bring_together(*f, i, sides.data(), width); });
  // A group then keeps some 64 columns of a block.
  const int64_t kept = std::max<int64_t>(1, f->starts[groups(*f)]);
  const int64_t some = 64 * groups(*f) * f->columns / kept / 64 * 64;
  const int64_t block = std::min<int64_t>(std::max<int64_t>(some, 256), 4096);
  parallel_for((f->columns + block - 1) / block, threads, 1, [&](int64_t i) {
    of.weight(*f, sides.data(), width, i * block, std::min((i + 1) * block, f->columns));
  });
}
