// The merge of a packed batch: every segment is an image, and runs the code of the dense operator.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "gathered.h"
#include "merge.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

template <class T>
struct PackedMemory {
  PackedMemory(Memory& memory, const Rows& features, int64_t n, int64_t d, int64_t k, int slots)
      : gathered(memory, features, n),
        indices(memory.take<int64_t>(k)),
        assignment(memory.take<int64_t>(n)),
        merge(memory, n, d, k, slots) {}
  Gathered gathered;
  int64_t *indices, *assignment;
  MergeMemory<T> merge;
};

// Values that nobody has checked, those outside of [0, limit) as -1: where offsets are wrong, they are another
// segment's.
void bound(const int64_t* values, int64_t n, int64_t limit, int64_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = values[i] >= 0 && values[i] < limit ? values[i] : -1;
}

template <class T>
std::tuple<Tensor, Tensor> merge_varlen_as(const Tensor& features, const std::optional<Tensor>& scores,
                                           const Tensor& indices, const Tensor& assignment, const Tensor& cu_seqlens,
                                           const Tensor& cu_kept, int64_t max_seqlen, const Merging& merging) {
  const int64_t num_tokens = features.size(0), D = features.size(1), total_keep = indices.size(0);
  const auto a = contiguous_as("scores", scores, kScalarType<T>);
  const Tensor kept = contiguous_as("indices", indices, ScalarType::Long),
               rows = contiguous_as("assignment", assignment, ScalarType::Long);
  const Tensor merged = empty("merged", {total_keep, D}, features.scalar_type());
  const Tensor mass = empty("mass", {total_keep}, kScalarType<T>);
  const Rows tokens = rows_of(features);
  const int64_t row_bytes = D * tokens.element_size();
  const auto clear = [&](int64_t first, int64_t end) {  // rows that no segment fills
    if (first == end) return;
    std::memset(output<char>(merged) + first * row_bytes, 0, (end - first) * row_bytes);
    std::fill(output<T>(mass) + first, output<T>(mass) + end, T{0});
  };
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, num_tokens, total_keep, max_seqlen);
  int64_t filled = 0;
  for (const Part& part : parts) {
    clear(filled, part.first_row);
    filled = part.first_row + part.num_rows;
  }
  clear(filled, total_keep);
  const auto count = static_cast<int64_t>(parts.size());
  if (count == 0) return {merged, mass};
  const int64_t most_tokens = longest(parts), most = most_rows(parts);
  const auto pieces = [&](Memory& memory, int slots) {
    return PackedMemory<T>(memory, tokens, most_tokens, D, most, slots);
  };
  for_each_image(count, num_tokens * D / count, pieces, [&](int64_t p, auto& memory, Crew& crew) {
    const Part& part = parts[p];
    if (part.num_rows == 0) return;
    bound(data_of<int64_t>(kept) + part.first_row, part.num_rows, part.num_tokens, memory.indices);
    bound(data_of<int64_t>(rows) + part.first_token, part.num_tokens, part.num_rows, memory.assignment);
    merge_image<T>(memory.gathered.of(tokens.part(part.first_token, part.num_tokens), crew),
                   a ? data_of<T>(*a) + part.first_token : nullptr, memory.indices, memory.assignment, part.num_rows,
                   crew, memory.merge, output<char>(merged) + part.first_row * row_bytes,
                   output<T>(mass) + part.first_row, merging);
  });
  return {merged, mass};
}

std::tuple<Tensor, Tensor> merge_varlen(const Tensor& features, std::optional<Tensor> scores, const Tensor& indices,
                                        const Tensor& assignment, const Tensor& cu_seqlens, const Tensor& cu_kept,
                                        int64_t max_seqlen, const Text& mode, double centre_weight) {
  check_channels("features", features, "T D", 2);
  const std::vector<int64_t> tokens = {features.size(0)};
  check_merge_scores(scores, "T", tokens);
  check_rank("indices", indices, "total_keep", 1);
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  check_shape("assignment", assignment, "T", tokens);
  check_dtype("assignment", assignment, {ScalarType::Long}, "int64");
  check_segments(cu_seqlens, max_seqlen);
  check_rows(cu_kept, cu_seqlens, indices.size(0), features.size(0));
  const Merging merging = merging_of(mode, centre_weight);
  const auto run = works_in_double(features, scores) ? merge_varlen_as<double> : merge_varlen_as<float>;
  return run(features, scores, indices, assignment, cu_seqlens, cu_kept, max_seqlen, merging);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("merge_varlen", TORCH_BOX(&merge_varlen)); }

}  // namespace condense
