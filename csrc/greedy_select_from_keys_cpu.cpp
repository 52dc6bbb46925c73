// The greedy selection from keys: of their similarities no more is computed than the picks need, and none is returned.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "environment.h"
#include "greedy_select.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

// How the picks of images of one size are found. They are the same either way.
enum class Way {
  kTopK,    // nothing is suppressed: no similarity is needed
  kStored,  // all of s is computed and stored
  kLazy,    // the rows of the picks are computed, and the squares of the pools; all of s at most for its mean
};

struct Plan {
  Plan(int64_t n, int64_t k, bool has_prior, bool suppresses, bool scale_prior, bool max_min)
      : n(n),
        k(k),
        pool(std::min({n, kPool, width_of(k) + kTile})),
        max_min(max_min),
        needs_mean(suppresses && scale_prior && has_prior) {
    if (!suppresses && !max_min) {
      way = Way::kTopK;
    } else if (n <= stored_tokens() && (needs_mean || max_min || rounds_cost(kExpectedRounds) > 0.9 * stored_cost())) {
      way = Way::kStored;
    } else {
      way = Way::kLazy;
    }
  }

  // In products of two keys. A round has those of its pool, and of a packing of all keys: as long as 16 rows take.
  double stored_cost() const { return 0.5 * static_cast<double>(n) * static_cast<double>(n); }
  double round_cost() const { return 16.0 * static_cast<double>(n) + 0.5 * static_cast<double>(pool * pool); }
  double rounds_cost(double rounds) const {
    return static_cast<double>(n) * static_cast<double>(k) + rounds * round_cost();
  }

  // Tokens in many copies may end a round with every pick. Once the rounds have cost as much as s, it is s that is
  // computed after all.
  Rounds rounds() const {
    Rounds found;
    found.keep_rows = false;
    if (n <= stored_tokens()) found.most = static_cast<int64_t>((stored_cost() - rounds_cost(0)) / round_cost());
    return found;
  }

  // Multiply-adds of an image, more or less.
  double work(int64_t channels) const {
    const double pairs = way == Way::kTopK                  ? static_cast<double>(n)
                         : way == Way::kLazy && !needs_mean ? rounds_cost(1)
                                                            : stored_cost();
    return pairs * static_cast<double>(channels);
  }

  static constexpr double kExpectedRounds = 4;  // 2 to 5 were seen where half of the tokens or fewer are copies
  int64_t n, k, pool;
  bool max_min, needs_mean;
  Way way = Way::kStored;
};

template <class T>
struct ImageMemory {
  ImageMemory(Memory& memory, const Plan& plan, int slots) : ImageMemory(memory, plan, slots, plan.way) {}
  ImageMemory(Memory& memory, const Plan& plan, int slots, Way way)
      : tier(memory.take<int8_t>(plan.n)),
        g(memory.take<T>(plan.n)),
        s(memory.take<T>(way == Way::kStored ? plan.n
                         : way == Way::kTopK ? 1
                                             : 0,
                         plan.n)),
        rows(memory.take<T>(way == Way::kLazy ? std::min(plan.k, plan.pool) + kTile : 0, width_of(plan.n))),
        greedy(memory, way == Way::kLazy ? 0 : plan.n),
        lazy(memory, way == Way::kLazy ? plan.n : 0, plan.pool),
        similarity(memory, plan.n, slots, way != Way::kLazy || !plan.needs_mean) {}
  int8_t* tier;
  T *g, *s, *rows;  // s [n, n], or [n] of zeros
  GreedyMemory<T> greedy;
  StreamedGreedyMemory<T> lazy;
  SimilarityMemory<T> similarity;
};

// Where rounds end after few picks: the rest of them from all of s, in a block of its own.
template <class T>
void finish_on_stored(const Rows& keys, const uint8_t* mask, const Plan& plan, const Selection<T>& selection,
                      int64_t made, Crew& crew, ImageMemory<T>& memory, int64_t* order) {
  const int64_t n = plan.n, bytes = bytes_of(bytes_of(n, n), sizeof(T));
  const Workspace block(bytes);
  T* s = block.piece(0, bytes).template take<T>(n, n);
  T sbar;
  similarity_image<T>(keys, selection.prior, mask, crew, memory.similarity, s, &sbar, memory.g, memory.tier);
  greedy_select_resumed<T>(s, n, selection, n, made, plan.k, memory.lazy.all, order);
}

template <class T>
void pick_lazily(const Rows& keys, const uint8_t* mask, const Plan& plan, Selection<T> selection, Crew& crew,
                 ImageMemory<T>& memory, int64_t* order) {
  const GreedyMemory<T>& all = memory.lazy.all;
  if (plan.max_min) {
    selection.first = pick_farthest_streamed<T>(keys, selection, crew, memory.similarity, all, memory.rows);
  }
  const int64_t made = greedy_select_streamed<T>(keys, selection, plan.k, crew, memory.similarity, memory.lazy, order,
                                                 memory.rows, plan.rounds());
  const bool is_done = made == plan.k || std::all_of(all.nu, all.nu + plan.n, [](T nu) { return std::isnan(nu); });
  if (!is_done) finish_on_stored<T>(keys, mask, plan, selection, made, crew, memory, order);
}

template <class T>
void pick_image(const Rows& keys, const uint8_t* mask, const Plan& plan, Selection<T> selection, Crew& crew,
                ImageMemory<T>& memory, int64_t* order) {
  const int64_t n = plan.n;
  T sbar = 0;
  if (plan.way == Way::kStored || plan.needs_mean) {
    similarity_image<T>(keys, selection.prior, mask, crew, memory.similarity, memory.s, &sbar, memory.g, memory.tier);
  } else {
    measure_keys<T>(keys, selection.prior, mask, crew, memory.similarity, memory.tier);
  }
  selection.tier = memory.tier;
  if (plan.needs_mean) selection.sbar = &sbar;
  switch (plan.way) {
    case Way::kTopK:
      std::fill(memory.s, memory.s + n, T{0});
      return greedy_select_image<T>(memory.s, 0, selection, false, n, plan.k, crew, memory.greedy, order);
    case Way::kStored:
      return greedy_select_image<T>(memory.s, n, selection, plan.max_min, n, plan.k, crew, memory.greedy, order);
    case Way::kLazy:
      return pick_lazily<T>(keys, mask, plan, selection, crew, memory, order);
  }
}

template <class T>
Tensor greedy_select_from_keys_as(const Tensor& keys, const std::optional<Tensor>& prior, int64_t k,
                                  const std::optional<Tensor>& mask, bool scale_prior, const Options& options) {
  const int64_t B = keys.size(0), N = keys.size(1);
  const Arguments<T> arguments(prior, options);
  if (arguments.has_index) check_values("first", data_of<int64_t>(*arguments.first), B, -1, N);
  const auto valid = contiguous_as("mask", mask, ScalarType::Bool);
  const Plan plan(N, k, prior.has_value(), arguments.suppression != 0, scale_prior, options.max_min);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  if (k == 0) return order;
  const auto pieces = [&](Memory& memory, int slots) { return ImageMemory<T>(memory, plan, slots); };
  for_each_image(B, plan.work(keys.size(2)), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    pick_image<T>(rows_of(keys, b), row_of<uint8_t>(valid, b, N), plan, arguments.image(b, b * N), crew, memory,
                  output<int64_t>(order) + b * k);
  });
  return order;
}

Tensor greedy_select_from_keys(const Tensor& keys, std::optional<Tensor> prior, int64_t k, std::optional<Tensor> mask,
                               double suppression, bool scale_prior, std::optional<Tensor> first,
                               std::optional<Tensor> candidates, std::string combine, bool max_min,
                               std::string metric) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  const std::vector<int64_t> tokens = {keys.size(0), keys.size(1)};
  if (prior) {
    check_shape("prior", *prior, "B N", tokens);
    check_floating("prior", *prior);
  }
  check_count("k", k, keys.size(1));
  if (mask) {
    check_shape("mask", *mask, "B N", tokens);
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  const Options options{{}, {}, first, candidates, suppression, combine_of(combine), max_min};
  check_options(options, "B", {keys.size(0)}, "B N", tokens);
  check_choice("metric", metric, {"cosine"});
  const bool wide = is_double(keys) || (prior && is_double(*prior));
  const auto run = wide ? greedy_select_from_keys_as<double> : greedy_select_from_keys_as<float>;
  return run(keys, prior, k, mask, scale_prior, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("greedy_select_from_keys", TORCH_BOX(&greedy_select_from_keys)); }

}  // namespace condense
