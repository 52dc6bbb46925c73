// Weighted sums of listed tokens, and their gradients: of x a token after the other, by the places that name it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "merge.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

// What one image sums. Weights are null where all of them are 1.
template <class T>
struct Lists {
  const int64_t* neighbours;  // [K, m]
  const T* weights;           // [K, m]
  int64_t K, m;

  T weight(int64_t place) const { return weights ? weights[place] : T{1}; }
};

void copy_row(const Rows& rows, int64_t i, char* to) {
  const int64_t size = rows.element_size();
  if (rows.stride_d == 1) return void(std::memcpy(to, rows.at(i, 0), rows.d * size));
  for (int64_t c = 0; c < rows.d; ++c) std::memcpy(to + c * size, rows.at(i, c), size);
}

template <class T>
struct GatherMemory {
  GatherMemory(Memory& memory, int64_t d, int slots) : rows(memory.take<T>(d, 2 * slots)) {}
  T* rows;  // [slots, 2, d]
};

// merged [K, D] contiguous in the dtype of x.
template <class T>
void gather_image(const Rows& x, const Lists<T>& lists, Crew& crew, const GatherMemory<T>& memory, char* merged) {
  const RowOps<T>& ops = row_ops<T>();
  crew.run([&](int slot) {
    T *row = memory.rows + 2 * slot * x.d, *sum = row + x.d;
    const Share share(lists.K, slot, crew.size());
    for (int64_t k = share.lo; k < share.hi; ++k) {
      char* to = merged + k * x.d * x.element_size();
      const int64_t* listed = lists.neighbours + k * lists.m;
      const auto none = static_cast<int64_t>(std::count(listed, listed + lists.m, -1));
      if (!lists.weights && lists.m - none == 1) {
        copy_row(x, *std::find_if(listed, listed + lists.m, [](int64_t i) { return i >= 0; }), to);
        continue;
      }
      std::fill(sum, sum + x.d, T{0});
      for (int64_t j = 0; j < lists.m; ++j) {
        if (listed[j] < 0) continue;
        ops.accumulate_row(row_as(x, listed[j], row), lists.weight(k * lists.m + j), x.d, sum);
      }
      ops.store_row(sum, x.dtype, x.d, to);
    }
  });
}

template <class T>
Tensor gather_merge_as(const Tensor& x, const Tensor& neighbours, const std::optional<Tensor>& weights) {
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), K = neighbours.size(1), m = neighbours.size(2);
  const Tensor listed = contiguous_as("neighbours", neighbours, ScalarType::Long);
  check_values("neighbours", data_of<int64_t>(listed), B * K * m, -1, N);
  const auto weighed = contiguous_as("weights", weights, kScalarType<T>);
  const Tensor merged = empty("merged", {B, K, D}, x.scalar_type());
  const auto pieces = [&](Memory& memory, int slots) { return GatherMemory<T>(memory, D, slots); };
  for_each_image(B, static_cast<double>(K) * m * D, pieces, [&](int64_t b, auto& memory, Crew& crew) {
    const Rows image = rows_of(x, b);
    const Lists<T> lists{data_of<int64_t>(listed) + b * K * m, row_of<T>(weighed, b, K * m), K, m};
    gather_image(image, lists, crew, memory, output<char>(merged) + b * K * D * image.element_size());
  });
  return merged;
}

void check_listed(const Tensor& neighbours, const std::optional<Tensor>& weights, const std::vector<int64_t>& sizes) {
  check_shape("neighbours", neighbours, "B K m", sizes);
  check_dtype("neighbours", neighbours, {ScalarType::Long}, "int64");
  if (!weights) return;
  check_shape("weights", *weights, "B K m", sizes);
  check_floating("weights", *weights);
}

Tensor gather_merge(const Tensor& x, const Tensor& neighbours, std::optional<Tensor> weights) {
  check_channels("x", x, "B N D");
  check_rank("neighbours", neighbours, "B K m", 3);
  check_listed(neighbours, weights, {x.size(0), neighbours.size(1), neighbours.size(2)});
  const bool wide = is_double(x) || (weights && is_double(*weights));
  return (wide ? gather_merge_as<double> : gather_merge_as<float>)(x, neighbours, weights);
}

// The gradients

template <class T>
struct SlopeMemory {
  SlopeMemory(Memory& memory, int64_t n, int64_t d, int64_t k, int64_t m, int slots)
      : first(memory.take<int64_t>(n + 2)),
        places(memory.take<int64_t>(k, m)),
        products(memory.take<double>(m, slots)),
        rows(memory.take<T>(d, 4 * slots)) {}
  int64_t *first, *places;  // those of token i are places[first[i], first[i + 1])
  double* products;         // [slots, m]
  T* rows;                  // [slots, 4, d]
};

// One image.
template <class T>
struct Slopes {
  Rows grad_merged, x;  // [K, D], [N, D]; x without data where it is not given
  Lists<T> lists;
  int64_t N;
  char *grad_x, *grad_weights;  // [N, D], [K, m], contiguous
  Dtype weights_dtype;
  int64_t weights_size;

  void of_token(int64_t i, const SlopeMemory<T>& memory, T* row, T* sum) const {
    const RowOps<T>& ops = row_ops<T>();
    const int64_t D = grad_merged.d;
    std::fill(sum, sum + D, T{0});
    for (int64_t t = memory.first[i]; t < memory.first[i + 1]; ++t) {
      const int64_t place = memory.places[t];
      ops.accumulate_row(row_as(grad_merged, place / lists.m, row), lists.weight(place), D, sum);
    }
    ops.store_row(sum, grad_merged.dtype, D, grad_x + i * D * grad_merged.element_size());
  }

  // zeros and dropped are [D].
  void of_weights(int64_t k, double* products, T* row, T* slope, const T* zeros, T* dropped) const {
    const int64_t* listed = lists.neighbours + k * lists.m;
    const T* of_row = row_as(grad_merged, k, slope);
    for (int64_t j = 0; j < lists.m; ++j) {
      products[j] = 0;
      if (!x.data || listed[j] < 0) continue;
      products[j] = row_ops<T>().gradient_row(row_as(x, listed[j], row), zeros, of_row, T{0}, x.d, dropped);
    }
    row_ops<double>().store_row(products, weights_dtype, lists.m, grad_weights + k * lists.m * weights_size);
  }
};

template <class T>
void gather_merge_backward_image(const Slopes<T>& image, Crew& crew, const SlopeMemory<T>& memory) {
  const int64_t D = image.grad_merged.d, K = image.lists.K, m = image.lists.m;
  sort_by_row(image.lists.neighbours, K * m, image.N, memory.first, memory.places);
  const int64_t cost = memory.first[image.N] + image.N;  // slopes to add and rows to write: what slots share equally
  crew.run([&](int slot) {
    T *row = memory.rows + 4 * slot * D, *sum = row + D, *zeros = sum + D, *dropped = zeros + D;
    const Share share(cost, slot, crew.size()), rows(K, slot, crew.size());
    for (int64_t i = 0; i < image.N; ++i) {
      const int64_t before = memory.first[i] + i;
      if (before >= share.lo && before < share.hi) image.of_token(i, memory, row, sum);
    }
    std::fill(zeros, zeros + D, T{0});
    for (int64_t k = rows.lo; k < rows.hi; ++k) {
      image.of_weights(k, memory.products + slot * m, row, sum, zeros, dropped);
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor> gather_merge_backward_as(const Tensor& grad_merged, const std::optional<Tensor>& x,
                                                    const Tensor& neighbours, const std::optional<Tensor>& weights,
                                                    int64_t N, ScalarType dtype) {
  const int64_t B = grad_merged.size(0), D = grad_merged.size(2), K = neighbours.size(1), m = neighbours.size(2);
  const Tensor listed = contiguous_as("neighbours", neighbours, ScalarType::Long);
  check_values("neighbours", data_of<int64_t>(listed), B * K * m, -1, N);
  const auto weighed = contiguous_as("weights", weights, kScalarType<T>);
  const Tensor grad_x = empty("grad_x", {B, N, D}, grad_merged.scalar_type());
  const Tensor grad_weights = empty("grad_weights", {B, K, m}, dtype);
  const int64_t size = element_size(dtype);
  const auto pieces = [&](Memory& memory, int slots) { return SlopeMemory<T>(memory, N, D, K, m, slots); };
  for_each_image(B, static_cast<double>(K) * m * D + static_cast<double>(N) * D, pieces,
                 [&](int64_t b, auto& memory, Crew& crew) {
                   const Rows slopes = rows_of(grad_merged, b);
                   const Slopes<T> image{slopes,
                                         x ? rows_of(*x, b) : Rows{},
                                         {data_of<int64_t>(listed) + b * K * m, row_of<T>(weighed, b, K * m), K, m},
                                         N,
                                         output<char>(grad_x) + b * N * D * slopes.element_size(),
                                         output<char>(grad_weights) + b * K * m * size,
                                         dtype_of(grad_weights),
                                         size};
                   gather_merge_backward_image(image, crew, memory);
                 });
  return {grad_x, grad_weights};
}

std::tuple<Tensor, Tensor> gather_merge_backward(const Tensor& grad_merged, std::optional<Tensor> x,
                                                 const Tensor& neighbours, std::optional<Tensor> weights,
                                                 const std::vector<int64_t>& sizes) {
  check_channels("grad_merged", grad_merged, "B K D");
  const int64_t B = grad_merged.size(0), K = grad_merged.size(1), D = grad_merged.size(2);
  if (sizes.size() != 2 || sizes[0] < 0 || sizes[1] != D) {
    fail("sizes: expected [N, D] with D = ", D, ", as grad_merged has, got ", shape_text(sizes), ".");
  }
  const ScalarType narrow = grad_merged.scalar_type();
  if (x) {
    check_shape("x", *x, "B N D", {B, sizes[0], D});
    check_dtype("x", *x, {narrow}, dtype_name(narrow).c_str());
  }
  check_rank("neighbours", neighbours, "B K m", 3);
  check_listed(neighbours, weights, {B, K, neighbours.size(2)});
  const bool wide = is_double(grad_merged) || (weights && is_double(*weights));
  const ScalarType dtype = weights ? weights->scalar_type() : wide ? ScalarType::Double : ScalarType::Float;
  const auto run = wide ? gather_merge_backward_as<double> : gather_merge_backward_as<float>;
  return run(grad_merged, x, neighbours, weights, sizes[0], dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("gather_merge", TORCH_BOX(&gather_merge));
  m.impl("gather_merge_backward", TORCH_BOX(&gather_merge_backward));
}

}  // namespace condense
