// Between torch's tensors and the stages' plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "stages.h"

namespace condense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// The tensor itself where it fits already, as for most callers: a cast costs more than a small image.
inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  const Tensor cast = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

inline std::optional<Tensor> contiguous_as(const std::optional<Tensor>& t, ScalarType dtype) {
  return t ? std::optional<Tensor>(contiguous_as(*t, dtype)) : std::nullopt;
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Row b of a contiguous tensor with rows of n elements; null where there is no tensor.
template <class T>
const T* row_of(const std::optional<Tensor>& t, int64_t b, int64_t n) {
  return t ? data_of<T>(*t) + b * n : nullptr;
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      return Dtype::kFloat32;
  }
}

// Image b of tokens [B, N, D] in any layout.
inline Rows rows_of(const Tensor& t, int64_t b) {
  Rows rows{static_cast<const char*>(t.const_data_ptr()), dtype_of(t), t.size(1), t.size(2), t.stride(1), t.stride(2)};
  rows.data += b * t.stride(0) * rows.element_size();
  return rows;
}

// Similarities [B, N, N] whose rows may be strided as long as their elements are not.
struct Matrices {
  explicit Matrices(const Tensor& t)
      : s(t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t)), ld(s.stride(1)) {}
  template <class T>
  const T* at(int64_t b) const {
    return data_of<T>(s) + b * s.stride(0);
  }
  Tensor s;
  int64_t ld;
};

// Where the tokens of image b are; positions is contiguous fp64, [N, P] for all images or [B, N, P].
template <class T>
Layout<T> layout_of(const std::optional<std::vector<int64_t>>& grid, const std::optional<Tensor>& positions, int64_t b,
                    int64_t n, const int8_t* tier, double spatial_weight) {
  if (spatial_weight == 0) return Layout<T>::none();
  if (grid) return Layout<T>::of_grid(grid->data(), static_cast<int64_t>(grid->size()), n, tier, spatial_weight);
  const int64_t axes = positions->size(positions->dim() - 1);
  const double* places = data_of<double>(*positions) + (positions->dim() == 3 ? b * n * axes : 0);
  return Layout<T>::of_positions(places, axes, n, tier, spatial_weight);
}

}  // namespace condense
