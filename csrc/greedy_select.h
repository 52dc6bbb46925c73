// What the forms of greedy_select have in common: on similarities or keys, dense or packed.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {

// The optional arguments, which the operators share; sbar and tier are not given where keys are.
struct Options {
  std::optional<Tensor> sbar, tier, first, candidates;
  double suppression;
  Combine combine;
  bool max_min;
};

// Of an operator's arguments in the working type: each image's part of them.
template <class T>
struct Arguments {
  Arguments(const std::optional<Tensor>& prior, const Options& options)
      : prior(contiguous_as("prior", prior, kScalarType<T>)),
        sbar(contiguous_as("sbar", options.sbar, kScalarType<T>)),
        tier(contiguous_as("tier", options.tier, ScalarType::Char)),
        candidates(contiguous_as("candidates", options.candidates, ScalarType::Bool)),
        has_index(options.first && options.first->scalar_type() == ScalarType::Long),
        first(contiguous_as("first", options.first, has_index ? ScalarType::Long : kScalarType<T>)),
        suppression(static_cast<T>(options.suppression)),
        combine(options.combine) {}

  // Of image b, whose tokens are from `token` on.
  Selection<T> image(int64_t b, int64_t token) const {
    return {row_of<T>(prior, token, 1),
            row_of<T>(sbar, b, 1),
            row_of<int8_t>(tier, token, 1),
            row_of<uint8_t>(candidates, token, 1),
            has_index ? nullptr : row_of<T>(first, token, 1),
            has_index ? *row_of<int64_t>(first, b, 1) : -1,
            suppression,
            combine};
  }

  std::optional<Tensor> prior, sbar, tier, candidates;
  bool has_index;
  std::optional<Tensor> first;
  T suppression;
  Combine combine;
};

// Images, tokens: what the axes of the arguments beside s are named and sized.
inline void check_options(const Options& options, const char* image_axis, const std::vector<int64_t>& images,
                          const char* token_axes, const std::vector<int64_t>& tokens) {
  if (options.sbar) {
    check_shape("sbar", *options.sbar, image_axis, images);
    check_working("sbar", *options.sbar);
  }
  if (options.tier) {
    check_shape("tier", *options.tier, token_axes, tokens);
    if (options.tier->scalar_type() == ScalarType::Bool) {
      fail("tier: expected dtype int8, got bool. Remedy: candidates= says which tokens may be picked.");
    }
    check_dtype("tier", *options.tier, {ScalarType::Char}, "int8");
  }
  if (options.first && options.max_min) {
    fail("first, max_min: expected one of the two, got both. Remedy: leave out first.");
  }
  if (options.first) {
    const ScalarType dtype = options.first->scalar_type();
    const bool is_utility = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
                            dtype == ScalarType::Double;
    check_shape("first", *options.first, is_utility ? token_axes : image_axis, is_utility ? tokens : images);
    check_dtype("first", *options.first,
                {ScalarType::Long, ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double},
                "int64, float32, float16, bfloat16, float64");
  }
  if (options.candidates) {
    check_shape("candidates", *options.candidates, token_axes, tokens);
    check_dtype("candidates", *options.candidates, {ScalarType::Bool}, "bool");
  }
  check_weight("suppression", options.suppression);
}

inline Combine combine_of(const std::string& name) {
  check_choice("combine", name, {"sub", "mul"});
  return name == "sub" ? Combine::kSub : Combine::kMul;
}

}  // namespace condense
