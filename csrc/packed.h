// The segments of a packed batch.
//
// Offsets are data that nobody has checked. They are bounded before anything is read or written with them, and kept
// from decreasing: no token and no row then belongs to two segments, which may run at the same time.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "tensors.h"

namespace condense {

inline std::vector<int64_t> read_offsets(const Tensor& cu) {
  auto offsets = list_of<int64_t>(cu.numel(), "for the offsets");
  offsets.resize(cu.numel());
  column_of(cu).read(cu.numel(), offsets.data());
  return offsets;
}

inline void bound(std::vector<int64_t>& offsets, int64_t most) {
  int64_t before = 0;
  for (int64_t& offset : offsets) before = offset = std::clamp(offset, before, most);
}

// A segment cut to what exists; it has a token, and at most as many rows as tokens.
struct Part {
  int64_t number, first_token, num_tokens, first_row, num_rows;
};

// The segments that have a token, in their order. One that is longer than max_seqlen has none. Without cu_kept there
// are no rows.
inline std::vector<Part> parts_of(const Tensor& cu_seqlens, const std::optional<Tensor>& cu_kept, int64_t num_tokens,
                                  int64_t total_keep, int64_t max_seqlen) {
  std::vector<int64_t> tokens = read_offsets(cu_seqlens);
  bound(tokens, num_tokens);
  std::vector<int64_t> rows(tokens.size(), 0);
  if (cu_kept) {
    rows = read_offsets(*cu_kept);
    bound(rows, total_keep);
  }
  auto parts = list_of<Part>(static_cast<int64_t>(tokens.size()) - 1, "for the segments");
  for (size_t s = 0; s + 1 < tokens.size(); ++s) {
    const int64_t n = tokens[s + 1] - tokens[s];
    if (n == 0 || n > max_seqlen) continue;
    parts.push_back({static_cast<int64_t>(s), tokens[s], n, rows[s], std::min(n, rows[s + 1] - rows[s])});
  }
  return parts;
}

inline int64_t longest(const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) most = std::max(most, part.num_tokens);
  return most;
}

inline int64_t most_rows(const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) most = std::max(most, part.num_rows);
  return most;
}

inline void check_segments(const Tensor& cu_seqlens, int64_t max_seqlen) {
  check_rank("cu_seqlens", cu_seqlens, "S+1", 1);
  check_dtype("cu_seqlens", cu_seqlens, {ScalarType::Int}, "int32");
  check_not_empty("cu_seqlens", cu_seqlens, 0, "offset");
  if (max_seqlen < 0 || max_seqlen > kMostTokens) {
    fail("max_seqlen: expected 0 <= max_seqlen <= ", kMostTokens, " (tokens of one image), got ", max_seqlen, ".");
  }
}

inline void check_rows(const Tensor& cu_kept, const Tensor& cu_seqlens, int64_t total_keep, int64_t num_tokens) {
  check_shape("cu_kept", cu_kept, "S+1", {cu_seqlens.size(0)});
  check_dtype("cu_kept", cu_kept, {ScalarType::Int}, "int32");
  check_count("total_keep", total_keep, num_tokens, "T");
}

inline void check_packed_positions(const std::optional<Tensor>& positions, double spatial_weight, int64_t num_tokens) {
  if (positions) {
    check_rank("positions", *positions, "T P", 2);
    check_positions(*positions, "T P", {num_tokens, positions->size(1)});
  } else if (spatial_weight != 0) {
    fail(
        "positions: expected a tensor [T, P], as spatial_weight is not 0, got None. Remedy: spatial_weight=0 for "
        "assignment by similarity alone.");
  }
}

}  // namespace condense
