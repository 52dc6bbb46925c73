// What the operators that merge are told alike, and check alike.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {

inline Merging merging_of(const std::string& mode, double centre_weight) {
  check_choice("mode", mode, {"mean", "sum", "lerp"});
  if (!(centre_weight >= 0 && centre_weight <= 1)) {
    fail("centre_weight: expected a number in [0, 1], got ", centre_weight, ".");
  }
  if (mode == "mean") return {};
  return mode == "sum" ? Merging{MergeMode::kSum} : Merging{MergeMode::kLerp, centre_weight};
}

inline bool works_in_double(const Tensor& features, const std::optional<Tensor>& scores) {
  return is_double(features) || (scores && is_double(*scores));
}

inline bool is_floating(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

inline void check_channels(const char* name, const Tensor& t, const char* axes, int64_t rank = 3) {
  check_rank(name, t, axes, rank);
  check_floating(name, t);
  check_not_empty(name, t, rank - 1, "channel");
}

inline void check_merge_scores(const std::optional<Tensor>& scores, const char* axes,
                               const std::vector<int64_t>& sizes) {
  if (!scores) return;
  check_shape("scores", *scores, axes, sizes);
  check_dtype("scores", *scores,
              {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double, ScalarType::Long,
               ScalarType::Int, ScalarType::Short, ScalarType::Char, ScalarType::Byte, ScalarType::Bool},
              "float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool");
}

inline void check_clusters(int64_t batch, int64_t num_tokens, const std::optional<Tensor>& scores,
                           const Tensor& indices, const Tensor& assignment) {
  const std::vector<int64_t> tokens = {batch, num_tokens};
  check_merge_scores(scores, "B N", tokens);
  check_rank("indices", indices, "B K", 2);
  check_shape("indices", indices, "B K", {batch, indices.size(1)});
  check_dtype("indices", indices, {ScalarType::Long}, "int64");
  check_shape("assignment", assignment, "B N", tokens);
  check_dtype("assignment", assignment, {ScalarType::Long}, "int64");
}

}  // namespace condense
