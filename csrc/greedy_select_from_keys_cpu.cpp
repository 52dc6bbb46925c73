// The greedy selection from keys: of their similarities no more is computed than the picks need, and none is returned.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "gathered.h"
#include "greedy_select.h"
#include "packed.h"
#include "stages.h"
#include "storing.h"
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
  Plan(const Storing& storing, Metric metric, bool has_prior, bool suppresses, bool scale_prior, bool max_min,
       bool all_are_candidates)
      : storing(storing),
        n(storing.n),
        k(storing.k),
        pool(pool_of(n, k)),
        metric(metric),
        max_min(max_min),
        needs_nearest(max_min && all_are_candidates),
        needs_mean(suppresses && scale_prior && has_prior) {
    if (!suppresses && !max_min) {
      way = Way::kTopK;
    } else if (needs_all() ? storing.is_chosen(kExpectedRounds + 1)
                           : storing.is_allowed() && (max_min || rounds_cost(kExpectedRounds) > 0.9 * stored_cost())) {
      way = Way::kStored;
    } else {
      way = Way::kLazy;
    }
  }

  bool needs_all() const { return needs_mean || needs_nearest; }

  // In products of two keys.
  double stored_cost() const { return 0.5 * storing.pairs() + storing.cost() / storing.channels; }
  double rounds_cost(double rounds) const { return storing.products_again(rounds); }

  // Tokens in many copies may end a round with every pick. Once the rounds have cost as much as s, it is s that is
  // computed after all.
  Rounds rounds() const {
    Rounds found;
    found.keep_rows = false;
    if (storing.is_allowed()) {
      found.most = static_cast<int64_t>((stored_cost() - rounds_cost(0)) / (rounds_cost(1) - rounds_cost(0)));
    }
    return found;
  }

  // Of an image, more or less.
  double work(int64_t channels) const {
    const double pairs = way == Way::kTopK                   ? static_cast<double>(n)
                         : way == Way::kLazy && !needs_all() ? rounds_cost(1)
                                                             : stored_cost();
    return products(pairs * static_cast<double>(channels)) + 5.0 * static_cast<double>(n * channels);
  }

  static constexpr double kExpectedRounds = 4;  // 2 to 5 were seen where half of the tokens or fewer are copies
  Storing storing;
  int64_t n, k, pool;
  Metric metric;
  bool max_min;
  bool needs_nearest;  // of each token: it comes with s
  bool needs_mean;
  Way way = Way::kStored;
};

template <class T>
struct ImageMemory {
  ImageMemory(Memory& memory, const Rows& keys, const Plan& plan, int slots)
      : ImageMemory(memory, keys, plan, slots, plan.way == Way::kLazy, plan.way == Way::kStored ? plan.n : 1) {}
  ImageMemory(Memory& memory, const Rows& keys, const Plan& plan, int slots, bool lazily, int64_t rows_of_s)
      : gathered(memory, keys, plan.n),
        tier(memory.take<int8_t>(plan.n)),
        g(memory.take<T>(plan.n)),
        s(memory.take<T>(lazily ? 0 : rows_of_s, plan.n)),
        rows(memory.take<T>(lazily ? std::min(plan.k, plan.pool) + kTile : 0, width_of(plan.n))),
        greedy(memory, lazily ? 0 : plan.n),
        lazy(memory, lazily ? plan.n : 0, plan.pool),
        opening(memory.take<T>(plan.needs_nearest ? plan.n : 0)),
        similarity(memory, plan.n, slots, !lazily || !plan.needs_all(), plan.metric, plan.needs_nearest) {}
  Gathered gathered;
  int8_t* tier;
  T *g, *s, *rows;  // s: all of it, or a row of zeros, or null
  GreedyMemory<T> greedy;
  StreamedGreedyMemory<T> lazy;
  T* opening;  // [n] what the first pick goes by
  SimilarityMemory<T> similarity;
};

// Where rounds end after few picks: the rest of them from all of s, in a block of its own.
template <class T>
void finish_on_stored(const Rows& keys, const uint8_t* mask, const Plan& plan, const Selection<T>& selection,
                      int64_t made, Crew& crew, ImageMemory<T>& memory, int64_t* order) {
  const int64_t n = plan.n;
  Memory count;
  count.take<T>(n, n);
  const Workspace block(count.taken());
  T* s = block.piece(0, count.taken()).template take<T>(n, n);
  T sbar;
  similarity_image<T>(keys, selection.prior, mask, crew, memory.similarity, s, &sbar, memory.g, memory.tier);
  greedy_select_resumed<T>(s, n, selection, n, made, plan.k, memory.lazy.all, order);
}

template <class T>
void pick_lazily(const Rows& keys, const uint8_t* mask, const Plan& plan, Selection<T> selection, bool max_min,
                 Crew& crew, ImageMemory<T>& memory, int64_t* order) {
  const GreedyMemory<T>& all = memory.lazy.all;
  if (max_min) {
    selection.first = pick_farthest_streamed<T>(keys, selection, crew, memory.similarity, all, memory.rows);
  }
  const int64_t made = greedy_select_streamed<T>(keys, selection, plan.k, crew, memory.similarity, memory.lazy, order,
                                                 memory.rows, plan.rounds());
  const bool is_done = made == plan.k || std::all_of(all.nu, all.nu + plan.n, [](T nu) { return std::isnan(nu); });
  if (!is_done) finish_on_stored<T>(keys, mask, plan, selection, made, crew, memory, order);
}

template <class T>
void pick_image(const Rows& given, const uint8_t* mask, const Plan& plan, Selection<T> selection, Crew& crew,
                ImageMemory<T>& memory, int64_t* order) {
  const int64_t n = plan.n;
  const Rows keys = memory.gathered.of(given, crew);
  T sbar = 0;
  if (plan.way == Way::kStored || plan.needs_all()) {
    similarity_image<T>(keys, selection.prior, mask, crew, memory.similarity, memory.s, &sbar, memory.g, memory.tier,
                        memory.opening);
  } else {
    measure_keys<T>(keys, selection.prior, mask, crew, memory.similarity, memory.tier);
  }
  selection.tier = memory.tier;
  if (plan.needs_mean) selection.sbar = &sbar;
  const bool max_min = plan.max_min && !plan.needs_nearest;
  if (plan.needs_nearest) {
    for (int64_t i = 0; i < n; ++i) memory.opening[i] = -memory.opening[i];
    selection.first_utilities = memory.opening;
  }
  switch (plan.way) {
    case Way::kTopK:
      std::fill(memory.s, memory.s + n, T{0});
      return greedy_select_image<T>(memory.s, 0, selection, false, n, plan.k, crew, memory.greedy, order);
    case Way::kStored:
      return greedy_select_image<T>(memory.s, n, selection, max_min, n, plan.k, crew, memory.greedy, order);
    case Way::kLazy:
      return pick_lazily<T>(keys, mask, plan, selection, max_min, crew, memory, order);
  }
}

// What the dense and the packed operator are given beside keys and k.
struct Given {
  const std::optional<Tensor>&prior, &mask;
  bool scale_prior;
  Metric metric;
  const Options& options;

  Plan plan(const Storing& storing, bool suppresses) const {
    return {storing, metric, prior.has_value(), suppresses, scale_prior, options.max_min, !options.candidates};
  }
};

template <class T>
Tensor greedy_select_from_keys_as(const Tensor& keys, int64_t k, const Given& given) {
  const int64_t B = keys.size(0), N = keys.size(1);
  const Arguments<T> arguments(given.prior, given.options);
  if (arguments.has_index) check_values("first", data_of<int64_t>(*arguments.first), B, -1, N);
  const auto valid = contiguous_as("mask", given.mask, ScalarType::Bool);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  if (k == 0) return order;
  const Plan plan = given.plan(Storing::of(rows_of(keys, 0), k, sizeof(T)), arguments.suppression != 0);
  const auto pieces = [&](Memory& memory, int slots) { return ImageMemory<T>(memory, rows_of(keys), plan, slots); };
  for_each_image(B, plan.work(keys.size(2)), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    pick_image<T>(rows_of(keys, b), row_of<uint8_t>(valid, b, N), plan, arguments.image(b, b * N), crew, memory,
                  output<int64_t>(order) + b * k);
  });
  return order;
}

template <class T>
Tensor greedy_select_from_keys_varlen_as(const Tensor& keys, const Tensor& cu_seqlens, const Tensor& cu_kept,
                                         int64_t total_keep, int64_t max_seqlen, const Given& given) {
  const Arguments<T> arguments(given.prior, given.options);
  const auto valid = contiguous_as("mask", given.mask, ScalarType::Bool);
  const Tensor order = empty("order", {total_keep}, ScalarType::Long);
  std::fill(output<int64_t>(order), output<int64_t>(order) + total_keep, -1);
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, keys.size(0), total_keep, max_seqlen);
  const auto plan_of = [&](const Part& part) {
    const Rows part_keys = rows_of(keys).part(part.first_token, part.num_tokens);
    return given.plan(Storing::of(part_keys, part.num_rows, sizeof(T)), arguments.suppression != 0);
  };
  Work work = 0;
  for (const Part& part : parts) {
    if (arguments.has_index) {
      check_values("first", data_of<int64_t>(*arguments.first) + part.number, 1, -1, part.num_tokens);
    }
    work += part.num_rows > 0 ? plan_of(part).work(keys.size(1)) : 0;
  }
  const auto count = static_cast<int64_t>(parts.size());
  const Schedule schedule = Schedule::for_batch(count, work / count);
  int64_t bytes = 0;
  for (const Part& part : parts) {
    Memory counted;
    if (part.num_rows > 0) ImageMemory<T>(counted, rows_of(keys), plan_of(part), schedule.slots);
    bytes = std::max(bytes, counted.taken());
  }
  const Workspace workspace(schedule.at_a_time * bytes);
  for_each_image(count, schedule, workspace, bytes, [&](int64_t p, Memory piece, Crew& crew) {
    const Part& part = parts[p];
    const int64_t first = part.first_token;
    if (part.num_rows == 0) return;
    const Plan plan = plan_of(part);
    ImageMemory<T> memory(piece, rows_of(keys), plan, schedule.slots);
    pick_image<T>(rows_of(keys).part(first, part.num_tokens), row_of<uint8_t>(valid, first, 1), plan,
                  arguments.image(part.number, first), crew, memory, output<int64_t>(order) + part.first_row);
  });
  return order;
}

// Whether the working type is fp64; axes are those of tokens.
bool check_given(const Tensor& keys, const char* axes, const std::vector<int64_t>& tokens, const char* image_axis,
                 const std::vector<int64_t>& images, const Given& given) {
  if (given.prior) {
    check_shape("prior", *given.prior, axes, tokens);
    check_floating("prior", *given.prior);
  }
  if (given.mask) {
    check_shape("mask", *given.mask, axes, tokens);
    check_dtype("mask", *given.mask, {ScalarType::Bool}, "bool");
  }
  check_options(given.options, image_axis, images, axes, tokens);
  return is_double(keys) || (given.prior && is_double(*given.prior));
}

Tensor greedy_select_from_keys(const Tensor& keys, std::optional<Tensor> prior, int64_t k, std::optional<Tensor> mask,
                               double suppression, bool scale_prior, std::optional<Tensor> first,
                               std::optional<Tensor> candidates, Text combine, bool max_min, Text metric) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  check_count("k", k, keys.size(1));
  const Options options{{}, {}, first, candidates, suppression, combine_of(combine), max_min};
  const Given given{prior, mask, scale_prior, metric_of(metric), options};
  const bool wide = check_given(keys, "B N", {keys.size(0), keys.size(1)}, "B", {keys.size(0)}, given);
  return wide ? greedy_select_from_keys_as<double>(keys, k, given) : greedy_select_from_keys_as<float>(keys, k, given);
}

Tensor greedy_select_from_keys_varlen(const Tensor& keys, std::optional<Tensor> prior, const Tensor& cu_seqlens,
                                      const Tensor& cu_kept, int64_t total_keep, int64_t max_seqlen,
                                      std::optional<Tensor> mask, double suppression, bool scale_prior,
                                      std::optional<Tensor> first, std::optional<Tensor> candidates, Text combine,
                                      bool max_min, Text metric) {
  check_rank("keys", keys, "T Dk", 2);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "channel");
  check_segments(cu_seqlens, max_seqlen);
  check_rows(cu_kept, cu_seqlens, total_keep, keys.size(0));
  const Options options{{}, {}, first, candidates, suppression, combine_of(combine), max_min};
  const Given given{prior, mask, scale_prior, metric_of(metric), options};
  const bool wide = check_given(keys, "T", {keys.size(0)}, "S", {cu_seqlens.size(0) - 1}, given);
  const auto run = wide ? greedy_select_from_keys_varlen_as<double> : greedy_select_from_keys_varlen_as<float>;
  return run(keys, cu_seqlens, cu_kept, total_keep, max_seqlen, given);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("greedy_select_from_keys", TORCH_BOX(&greedy_select_from_keys));
  m.impl("greedy_select_from_keys_varlen", TORCH_BOX(&greedy_select_from_keys_varlen));
}

}  // namespace condense
