// Between torch's tensors and the stages' plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "stages.h"
#include "text.h"

namespace condense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    default:
      return 4;
  }
}

// What make() makes, a tensor of these sizes. torch's own error would name neither the tensor nor its bytes.
template <class Make>
Tensor allocated(const std::string& what, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                 const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    int64_t bytes = element_size(dtype);
    for (const int64_t size : sizes) bytes = bytes_of(bytes, size);
    fail_to_allocate(bytes, "for " + what);
  }
}

// An uninitialised result of the operator.
inline Tensor empty(const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocated(name, sizes, dtype, [&] {
    const Tensor t = torch::stable::empty(sizes, dtype);
    on_huge_pages(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * element_size(dtype)));
    return t;
  });
}

// The tensor itself where it fits already, as for most callers: a cast costs more than a small image.
inline Tensor contiguous_as(const char* name, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  return allocated(std::string("a copy of ") + name, t.sizes(), dtype, [&] {
    const Tensor cast = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
    return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
  });
}

inline std::optional<Tensor> contiguous_as(const char* name, const std::optional<Tensor>& t, ScalarType dtype) {
  return t ? std::optional<Tensor>(contiguous_as(name, *t, dtype)) : std::nullopt;
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

inline Metric metric_of(const std::string& name) {
  check_choice("metric", name, {"cosine", "neg_l2"});
  return name == "cosine" ? Metric::kCosine : Metric::kNegL2;
}

// Image b of tokens [B, N, D] in any layout; a tensor [N, D] is its own only image.
inline Rows rows_of(const Tensor& t, int64_t b = 0) {
  const int64_t d = t.dim() - 1, offset = d == 2 ? b * t.stride(0) : 0;
  Rows rows{static_cast<const char*>(t.const_data_ptr()),
            dtype_of(t),
            t.size(d - 1),
            t.size(d),
            t.stride(d - 1),
            t.stride(d)};
  rows.data += offset * rows.element_size();
  return rows;
}

// Similarities [B, N, N] whose rows may be strided as long as their elements are not.
struct Matrices {
  explicit Matrices(const Tensor& t)
      : s(t.stride(2) == 1 || t.size(2) == 1 ? t : contiguous_as("s", t, t.scalar_type())), ld(s.stride(1)) {}
  template <class T>
  const T* at(int64_t b) const {
    return data_of<T>(s) + b * s.stride(0);
  }
  Tensor s;
  int64_t ld;
};

// A number for each token, [n], of any dtype and layout.
struct Column {
  const char* data = nullptr;  // null: there is none
  ScalarType dtype = ScalarType::Undefined;
  int64_t stride = 0;  // in bytes

  explicit operator bool() const { return data; }
  Column from(int64_t first) const { return {data + first * stride, dtype, stride}; }

  template <class T>
  void read(int64_t n, T* to) const {
    switch (dtype) {
      case ScalarType::Double:
        return read_as<double>(n, to);
      case ScalarType::Half:
        return read_as<c10::Half>(n, to);
      case ScalarType::BFloat16:
        return read_as<c10::BFloat16>(n, to);
      case ScalarType::Long:
        return read_as<int64_t>(n, to);
      case ScalarType::Int:
        return read_as<int32_t>(n, to);
      case ScalarType::Short:
        return read_as<int16_t>(n, to);
      case ScalarType::Char:
        return read_as<int8_t>(n, to);
      case ScalarType::Byte:
      case ScalarType::Bool:
        return read_as<uint8_t>(n, to);
      default:
        return read_as<float>(n, to);
    }
  }

 private:
  template <class From, class T>
  void read_as(int64_t n, T* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(*reinterpret_cast<const From*>(data + i * stride));
  }
};

// Row b of a tensor [B, N] in any layout; a tensor [N] is its own only row.
inline Column column_of(const Tensor& t, int64_t b = 0) {
  const auto size = static_cast<int64_t>(t.element_size());
  const int64_t token = t.dim() - 1;
  const int64_t offset = token == 0 ? 0 : b * t.stride(0);
  return {static_cast<const char*>(t.const_data_ptr()) + offset * size, t.scalar_type(), t.stride(token) * size};
}

// Number b of a tensor [B] in any layout; of an empty batch, whose first image is asked for its size, 0.
inline std::optional<double> number_of(const std::optional<Tensor>& t, int64_t b) {
  if (!t) return std::nullopt;
  double number = 0;
  if (b < t->size(0)) column_of(*t).from(b).read(1, &number);
  return number;
}

// Where an image's tokens are, as Eq. 6 is told: on a grid, or at positions [n, num_axes] of any dtype and layout.
struct Space {
  double spatial_weight;
  int64_t num_axes;  // 0 without a distance term
  const std::vector<int64_t>* grid;
  Column positions;     // along the first axis
  int64_t axis_stride;  // in bytes, from there to the next axis

  Space from(int64_t first) const {
    Space rest = *this;
    rest.positions = positions.from(first);
    return rest;
  }
};

// Image b's; positions are [B, N, P], or [N, P] for every image.
inline Space space_of(const std::optional<std::vector<int64_t>>& grid, const std::optional<Tensor>& positions,
                      double spatial_weight, int64_t b) {
  if (spatial_weight == 0) return {};
  if (grid) return {spatial_weight, static_cast<int64_t>(grid->size()), &*grid, {}, 0};
  const Tensor& p = *positions;
  const auto size = static_cast<int64_t>(p.element_size());
  const int64_t axis = p.dim() - 1, offset = axis == 2 ? b * p.stride(0) : 0;
  const Column first{static_cast<const char*>(p.const_data_ptr()) + offset * size, p.scalar_type(),
                     p.stride(axis - 1) * size};
  return {spatial_weight, p.size(axis), nullptr, first, p.stride(axis) * size};
}

template <class T>
struct SpaceMemory {
  SpaceMemory(Memory& memory, const Space& space, int64_t n)
      : layout(memory, n, space.num_axes), places(memory.take<double>(space.grid ? 0 : n, space.num_axes)) {}
  Layout<T> layout;
  double* places;

  // From the lowest valid one on: a double does not hold all of int64, but the difference to within its rounding.
  static void read_offsets(const Column& column, int64_t n, const int8_t* tier, double* to) {
    const auto at = [&](int64_t i) { return *reinterpret_cast<const int64_t*>(column.data + i * column.stride); };
    int64_t low = std::numeric_limits<int64_t>::max();
    for (int64_t i = 0; i < n; ++i) {
      if (!tier || tier[i] != kMasked) low = std::min(low, at(i));
    }
    for (int64_t i = 0; i < n; ++i)
      to[i] = static_cast<double>(static_cast<uint64_t>(at(i)) - static_cast<uint64_t>(low));
  }

  void fill(const Space& space, int64_t n, const int8_t* tier) {
    if (space.num_axes == 0) return;
    if (space.grid) return layout.set_grid(space.grid->data(), n, tier, space.spatial_weight);
    Column column = space.positions;
    for (int64_t axis = 0; axis < space.num_axes; ++axis, column.data += space.axis_stride) {
      if (column.dtype == ScalarType::Long) {
        read_offsets(column, n, tier, places + axis * n);
      } else {
        column.read(n, places + axis * n);
      }
    }
    layout.set_positions(places, n, tier, space.spatial_weight);
  }
};

}  // namespace condense
