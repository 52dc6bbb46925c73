// Between torch's tensors and the stages' plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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

// Elements of a one-channel tensor [n] in any layout, as T.
template <class T, class From>
void convert_from(const void* from, int64_t stride, int64_t n, T* to) {
  const auto* values = static_cast<const From*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(values[i * stride]);
}

template <class T>
void convert(const void* from, ScalarType dtype, int64_t stride, int64_t n, T* to) {
  switch (dtype) {
    case ScalarType::Double:
      return convert_from<T, double>(from, stride, n, to);
    case ScalarType::Half:
      return convert_from<T, c10::Half>(from, stride, n, to);
    case ScalarType::BFloat16:
      return convert_from<T, c10::BFloat16>(from, stride, n, to);
    case ScalarType::Long:
      return convert_from<T, int64_t>(from, stride, n, to);
    case ScalarType::Int:
      return convert_from<T, int32_t>(from, stride, n, to);
    case ScalarType::Short:
      return convert_from<T, int16_t>(from, stride, n, to);
    case ScalarType::Char:
      return convert_from<T, int8_t>(from, stride, n, to);
    case ScalarType::Byte:
    case ScalarType::Bool:
      return convert_from<T, uint8_t>(from, stride, n, to);
    default:
      return convert_from<T, float>(from, stride, n, to);
  }
}

// Row b of a tensor [B, N] in any layout, as T.
template <class T>
void convert_row(const Tensor& t, int64_t b, T* to) {
  const char* row = static_cast<const char*>(t.const_data_ptr()) + b * t.stride(0) * t.element_size();
  convert(row, t.scalar_type(), t.stride(1), t.size(1), to);
}

// Where the tokens are, as Eq. 6 is told.
struct Space {
  const std::optional<std::vector<int64_t>>& grid;
  const std::optional<Tensor>& positions;
  double spatial_weight;

  // 0 without a distance term.
  int64_t num_axes() const {
    if (spatial_weight == 0) return 0;
    return grid ? static_cast<int64_t>(grid->size()) : positions->size(positions->dim() - 1);
  }
};

template <class T>
struct SpaceMemory {
  SpaceMemory(Memory& memory, const Space& space, int64_t n)
      : layout(memory, n, space.num_axes()), places(memory.take<double>(space.positions ? n * layout.num_axes : 0)) {}
  Layout<T> layout;
  double* places;

  void fill(const Space& space, int64_t b, int64_t n, const int8_t* tier) {
    const int64_t axes = layout.num_axes;
    if (axes == 0) return;
    if (space.grid) return layout.set_grid(space.grid->data(), n, tier, space.spatial_weight);
    const Tensor& p = *space.positions;
    const bool shared = p.dim() == 2;
    for (int64_t axis = 0; axis < axes; ++axis) {
      const int64_t offset = (shared ? 0 : b * p.stride(0)) + axis * p.stride(p.dim() - 1);
      const char* column = static_cast<const char*>(p.const_data_ptr()) + offset * p.element_size();
      convert(column, p.scalar_type(), p.stride(p.dim() - 2), n, places + axis * n);
    }
    layout.set_positions(places, n, tier, space.spatial_weight);
  }
};

}  // namespace condense
