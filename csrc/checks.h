// Named validators for callers of the raw operators: what condense_kernels/_checks.py says to Python callers.
// They throw std::runtime_error, which arrives in Python as a RuntimeError with this text alone.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace condense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline void check_rank(const char* name, const Tensor& t, const char* axes, int64_t rank) {
  if (t.dim() != rank) {
    fail(name, ": expected ", rank, " axes [", axes, "], got ", t.dim(), ": ", shape_text(shape_of(t)), ".");
  }
}

// sizes as the arguments before this one have them.
inline void check_shape(const char* name, const Tensor& t, const char* axes, const std::vector<int64_t>& sizes) {
  check_rank(name, t, axes, static_cast<int64_t>(sizes.size()));
  if (shape_of(t) != sizes) {
    fail(name, ": expected shape [", axes, "] = ", shape_text(sizes), ", as the arguments before it have, got ",
         shape_text(shape_of(t)), ".");
  }
}

inline void check_not_empty(const char* name, const Tensor& t, int64_t axis, const char* what) {
  if (t.size(axis) == 0) fail(name, ": expected at least one ", what, ", got shape ", shape_text(shape_of(t)), ".");
}

inline void check_cpu(const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(name, ": expected device cpu, as of the first argument, got another device.");
}

// As Python calls it.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline void check_dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed,
                        const char* expected) {
  check_cpu(name, t);
  for (const ScalarType dtype : allowed) {
    if (t.scalar_type() == dtype) return;
  }
  fail(name, ": expected dtype ", expected, ", got ", dtype_name(t.scalar_type()), ".");
}

inline void check_floating(const char* name, const Tensor& t) {
  check_dtype(name, t, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double},
              "float32, float16, bfloat16, float64");
}

inline void check_working(const char* name, const Tensor& t) {
  check_dtype(name, t, {ScalarType::Float, ScalarType::Double}, "float32, float64");
}

inline void check_weight(const char* name, double value) {
  if (!(std::isfinite(value) && value >= 0 && value <= FLT_MAX)) {
    fail(name, ": expected a finite number >= 0, got ", value, ". Remedy: 0 switches the term off.");
  }
}

inline void check_weight(const char* name, std::optional<double> value) {
  if (value) check_weight(name, *value);
}

inline void check_choice(const char* name, const std::string& value, std::initializer_list<const char*> choices) {
  std::string allowed;
  for (const char* choice : choices) {
    if (value == choice) return;
    allowed += std::string(allowed.empty() ? "'" : " or '") + choice + "'";
  }
  fail(name, ": expected ", allowed, ", got '", value, "'.");
}

constexpr int64_t kMostTokens = int64_t{1} << 19;  // the fixed-point sum of |s| over all pairs then stays below 2^63

inline void check_num_tokens(const char* name, const Tensor& t) {
  if (t.size(1) > kMostTokens) fail(name, ": expected at most ", kMostTokens, " tokens an image, got ", t.size(1), ".");
}

inline void check_count(const char* name, int64_t value, int64_t n, const char* axis = "N") {
  if (value < 0 || value > n) {
    fail(name, ": expected 0 <= ", name, " <= ", n, " (", axis, " = ", n, " tokens), got ", value, ".");
  }
}

inline void check_budget(int64_t num_anchors, int64_t num_background, int64_t n) {
  check_count("num_anchors", num_anchors, n);
  check_count("num_background", num_background, n);
  const int64_t k = num_anchors + num_background;
  if (k < 1 || k > n) {
    fail("num_anchors + num_background: expected 1 <= K <= N = ", n, " tokens, got ", num_anchors, " + ",
         num_background, " = ", k, ". Remedy: keep fewer tokens than there are.");
  }
}

inline void check_positions(const Tensor& positions, const char* axes, const std::vector<int64_t>& sizes) {
  check_shape("positions", positions, axes, sizes);
  check_not_empty("positions", positions, positions.dim() - 1, "coordinate");
  check_dtype("positions", positions,
              {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double, ScalarType::Long,
               ScalarType::Int, ScalarType::Short, ScalarType::Char, ScalarType::Byte},
              "float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8");
}

// Grid or positions, not both; one of them unless the distance term is off.
inline void check_where(const std::optional<std::vector<int64_t>>& grid, const std::optional<Tensor>& positions,
                        double spatial_weight, int64_t b, int64_t n) {
  if (grid && positions) fail("grid, positions: expected one of the two, got both. Remedy: leave out grid.");
  if (!grid && !positions && spatial_weight != 0) {
    fail(
        "grid, positions: expected one of the two, as spatial_weight is not 0, got neither. Remedy: grid=(H, W), or "
        "spatial_weight=0 for assignment by similarity alone.");
  }
  if (grid) {
    int64_t left = n;  // divided by each size in turn: their product might not fit
    bool fits = grid->size() == 2 || grid->size() == 3;
    for (const int64_t size : *grid) {
      fits = fits && size >= 1 && left % size == 0;
      if (fits) left /= size;
    }
    if (!fits || left != 1) {
      fail("grid: expected (H, W) or (T, H, W) with product N = ", n, ", got ", shape_text(*grid),
           ". Remedy: positions= for tokens that are no full grid.");
    }
  }
  if (positions) {
    const Tensor& p = *positions;
    const int64_t axes = p.dim() > 0 ? p.size(p.dim() - 1) : 0;
    if (p.dim() == 3) {
      check_positions(p, "B N P", {b, n, axes});
    } else {
      check_positions(p, "N P", {n, axes});
    }
  }
}

// A tensor's addresses, from its first byte to behind its last one; none where it has no bytes.
struct Span {
  const char* name;
  uintptr_t first = 0, end = 0;

  explicit Span(const char* name) : name(name) {}
  Span(const char* name, const Tensor& t, const void* data) : name(name), first(reinterpret_cast<uintptr_t>(data)) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
    end = t.numel() == 0 ? first : first + (last + 1) * t.element_size();
  }
  static Span read(const char* name, const Tensor& t) { return {name, t, t.const_data_ptr()}; }
  static Span read(const char* name, const std::optional<Tensor>& t) { return t ? read(name, *t) : Span(name); }
  // What is copied on write has addresses of its own from here on.
  static Span written(const char* name, const Tensor& t) { return {name, t, t.mutable_data_ptr()}; }
};

// No range of addresses that is written, of which there are num_written and they come first, overlaps another one.
inline void check_apart(std::initializer_list<Span> spans, size_t num_written) {
  for (const Span* a = spans.begin(); a < spans.begin() + num_written; ++a) {
    for (const Span* b = a + 1; b < spans.end(); ++b) {
      const uintptr_t first = std::max(a->first, b->first), end = std::min(a->end, b->end);
      if (first < end) {
        fail(a->name, ": expected memory apart from that of ", b->name, ", got ", end - first,
             " bytes in the address ranges of both. Remedy: torch.empty_like(", a->name, ").");
      }
    }
  }
}

// Kernels read indices without looking; a value out of range must not get there.
inline void check_values(const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= high) {
      fail(name, ": expected values in [", low, ", ", high, "), got ", values[i], ".");
    }
  }
}

}  // namespace condense
