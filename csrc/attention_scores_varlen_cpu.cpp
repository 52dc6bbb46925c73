// Attention scores of a packed batch: every segment is an image, and runs the code of the dense operator.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention_scores.h"
#include "checks.h"
#include "packed.h"

namespace condense {
namespace {

// The longest first: what is left at the end, threads share evenly.
std::vector<Part> longest_first(std::vector<Part> parts) {
  std::stable_sort(parts.begin(), parts.end(),
                   [](const Part& a, const Part& b) { return a.num_tokens > b.num_tokens; });
  return parts;
}

template <class T>
Tensor attention_scores_varlen_as(const Tensor& queries, const Tensor& keys, const Tensor& cu_seqlens,
                                  int64_t max_seqlen, const std::optional<Tensor>& lse, double scale, bool causal) {
  const int64_t tokens = queries.size(0), heads = queries.size(1), d = queries.size(2);
  const int64_t key_heads = keys.size(1), shared = heads / key_heads;
  const Tensor scores = empty("scores", {heads, tokens}, kScalarType<T>);
  std::fill(output<T>(scores), output<T>(scores) + heads * tokens, T{0});
  const auto outside = contiguous_as("lse", lse, kScalarType<T>);
  const std::vector<Part> segments = longest_first(parts_of(cu_seqlens, std::nullopt, tokens, 0, max_seqlen));
  if (segments.empty()) return scores;
  const auto group_of = [&](const Part& segment, int64_t key_head) {
    const int64_t head = key_head * shared, at = head * tokens + segment.first_token, n = segment.num_tokens;
    const auto part = [&](const Tensor& t, int64_t h) {
      return rows_of_head(t, segment.first_token * t.stride(0) + h * t.stride(1), n, t.stride(0));
    };
    return HeadGroup<T>{part(keys, key_head),
                        part(queries, head),
                        shared,
                        queries.stride(1),
                        outside ? data_of<T>(*outside) + at : nullptr,
                        tokens,
                        nullptr,
                        nullptr,
                        n,
                        static_cast<T>(scale),
                        causal,
                        output<T>(scores) + at,
                        tokens};
  };
  Work work = 0;
  for (const Part& segment : segments) work += group_of(segment, 0).work();
  const int64_t longest = segments[0].num_tokens;
  const auto pieces = [&](Memory& memory, int slots) {
    return AttentionMemory<T>(memory, longest, longest, d, multiplies_in_pairs(rows_of_head(keys, 0, 0, 0)), slots);
  };
  const auto count = static_cast<int64_t>(segments.size());
  for_each_image(count * key_heads, work / count, pieces, [&](int64_t i, auto& memory, Crew& crew) {
    attention_scores_of(group_of(segments[i / key_heads], i % key_heads), crew, memory);
  });
  return scores;
}

Tensor attention_scores_varlen(const Tensor& queries, const Tensor& keys, const Tensor& cu_seqlens, int64_t max_seqlen,
                               std::optional<Tensor> lse, std::optional<double> scale, bool causal) {
  check_heads(queries, keys, "T Hq d", "T Hkv d", 3);
  const int64_t tokens = queries.size(0);
  check_shape("keys", keys, "T Hkv d", {tokens, keys.size(1), queries.size(2)});
  check_segments(cu_seqlens, max_seqlen);
  if (lse) {
    check_shape("lse", *lse, "Hq T", {queries.size(1), tokens});
    check_working("lse", *lse);
  }
  const auto run = is_double(queries) ? attention_scores_varlen_as<double> : attention_scores_varlen_as<float>;
  return run(queries, keys, cu_seqlens, max_seqlen, lse, scale_of(scale, queries.size(2)), causal);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("attention_scores_varlen", TORCH_BOX(&attention_scores_varlen)); }

}  // namespace condense
