// The same on a packed batch: every segment is an image.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "dpp_select.h"
#include "packed.h"

namespace condense {
namespace {

template <class T>
Tensor dpp_select_varlen_as(const Tensor& s, const std::vector<Part>& parts, int64_t total_keep,
                            const DppOptions& options) {
  const Tensor rows = s.scalar_type() == kScalarType<T> && (s.stride(1) == 1 || s.size(1) == 1)
                          ? s
                          : contiguous_as("s", s, kScalarType<T>);
  const int64_t ld = rows.stride(0);
  const DppArguments<T> arguments(options);
  const Tensor order = empty("order", {total_keep}, ScalarType::Long);
  std::fill(output<int64_t>(order), output<int64_t>(order) + total_keep, -1);
  const int64_t most = longest(parts), most_picks = most_rows(parts);
  Work work = 0;
  for (const Part& part : parts) work += dpp_work(part.num_tokens, part.num_rows);
  const auto count = static_cast<int64_t>(parts.size());
  const auto pieces = [&](Memory& memory, int) { return DppMemory<T>(memory, most, most_picks); };
  for_each_image(count, work / count, pieces, [&](int64_t p, const auto& memory, Crew& crew) {
    const Part& part = parts[p];
    dpp_select_image<T>(data_of<T>(rows) + part.first_token * ld, ld, arguments.from(part.first_token), part.num_tokens,
                        part.num_rows, crew, memory, output<int64_t>(order) + part.first_row);
  });
  return order;
}

Tensor dpp_select_varlen(const Tensor& s, std::optional<Tensor> quality, const Tensor& cu_seqlens,
                         const Tensor& cu_kept, int64_t total_keep, int64_t max_seqlen, std::optional<Tensor> tier,
                         std::optional<Tensor> candidates, double eps, double damping) {
  check_rank("s", s, "T max_seqlen", 2);
  check_working("s", s);
  check_segments(cu_seqlens, max_seqlen);
  if (s.size(1) != max_seqlen) {
    fail("s: expected rows of max_seqlen = ", max_seqlen, " columns, got ", s.size(1),
         ". Remedy: max_seqlen=s.shape[1].");
  }
  check_rows(cu_kept, cu_seqlens, total_keep, s.size(0));
  const DppOptions options{quality, tier, candidates, eps, damping};
  options.check("T", {s.size(0)});
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, s.size(0), total_keep, max_seqlen);
  return options.is_wide(s) ? dpp_select_varlen_as<double>(s, parts, total_keep, options)
                            : dpp_select_varlen_as<float>(s, parts, total_keep, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("dpp_select_varlen", TORCH_BOX(&dpp_select_varlen)); }

}  // namespace condense
