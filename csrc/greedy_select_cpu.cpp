// The greedy, similarity-suppressed selection of Eq. 2 and Eq. 4: one pass over a row of s for each pick.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "greedy_select.h"
#include "packed.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

// nu = -u with u = E|S| / E|prior| * prior; the mean over tiers 0 and 3 as a sum of integers, so its order is free.
template <class T>
void scale_prior(const Selection<T>& selection, int64_t n, T* nu) {
  const T* prior = selection.prior;
  const auto counted = [&](int64_t i) {
    return !selection.tier || selection.tier[i] == kValid || selection.tier[i] == kTaken;
  };
  T magnitude = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!counted(i)) continue;
    ++count;
    if (std::isfinite(prior[i])) magnitude = std::max(magnitude, std::fabs(prior[i]));
  }
  const Shrink<T> shrink(magnitude);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    nu[i] = shrink(prior[i]);  // below 1 in magnitude where finite
    if (counted(i) && std::isfinite(prior[i]))
      sum += static_cast<int64_t>(std::fabs(nu[i]) * T{1099511627776});  // 2^40
  }
  if (sum == 0) return std::fill(nu, nu + n, T{0});
  const double mean = static_cast<double>(sum) / static_cast<double>(count) / 1099511627776.0;
  const T ratio = static_cast<T>(static_cast<double>(*selection.sbar) / mean);
  for (int64_t i = 0; i < n; ++i) nu[i] = 0 - ratio * nu[i];
}

// A negated utility as it is compared: the lowest one for NaN, and finite.
template <class T>
T clamped(T nu) {
  constexpr T kMax = std::numeric_limits<T>::max();
  return std::isnan(nu) ? kMax : std::clamp(nu, -kMax, kMax);
}

// nu of every token, NaN where it is no candidate; returns how many are. Where nothing is suppressed there is nothing
// to scale for: sbar may be 0, and a rounded u would tie what the prior does not.
template <class T>
int64_t negate_utility(const Selection<T>& selection, int64_t n, T* nu) {
  if (!selection.prior) {
    std::fill(nu, nu + n, T{0});
  } else if (selection.sbar && selection.suppression != 0) {
    scale_prior(selection, n, nu);
  } else {
    for (int64_t i = 0; i < n; ++i) nu[i] = 0 - selection.prior[i];
  }
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!selection.is_candidate(i)) {
      nu[i] = std::numeric_limits<T>::quiet_NaN();
    } else {
      nu[i] = clamped(nu[i]);
      if (selection.combine == Combine::kMul) nu[i] = std::min(nu[i], T{0});  // else a score could rise
      ++candidates;
    }
  }
  return candidates;
}

// The first pick among the candidates that nu tells, of which there is one.
template <class T>
int64_t pick_first(const Selection<T>& selection, const T* nu, int64_t n, T* scratch) {
  const RowOps<T>& ops = row_ops<T>();
  if (selection.first >= 0 && !std::isnan(nu[selection.first])) return selection.first;
  if (!selection.first_utilities) return ops.first_pick(nu, n);
  for (int64_t i = 0; i < n; ++i) scratch[i] = std::isnan(nu[i]) ? nu[i] : clamped(0 - selection.first_utilities[i]);
  return ops.first_pick(scratch, n);
}

// Raises `nearest` by the rows [first, first + count) of s, which begin at `rows`, but for the tokens themselves.
template <class T>
void raise_nearest(const T* rows, int64_t ld, int64_t first, int64_t count, const T* nu, int64_t n, Crew& crew,
                   T* nearest) {
  const RowOps<T>& ops = row_ops<T>();
  crew.run([&](int slot) {
    const auto [lo, hi] = Share(n, slot, crew.size());
    for (int64_t j = first; j < first + count; ++j) {
      if (std::isnan(nu[j])) continue;
      const T* row = rows + (j - first) * ld;
      const int64_t before = std::clamp(j, lo, hi), after = std::clamp(j + 1, lo, hi);
      ops.raise_row(row + lo, before - lo, nearest + lo);
      ops.raise_row(row + after, hi - after, nearest + after);
    }
  });
}

template <class T>
int64_t farthest(const T* nu, int64_t n, T* nearest) {
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(nu[i])) nearest[i] = nu[i];
  }
  return row_ops<T>().first_pick(nearest, n);
}

// The candidate whose nearest other candidate is farthest: the rows of the others have the least for it.
template <class T>
int64_t pick_farthest(const T* s, int64_t ld, const T* nu, int64_t n, Crew& crew, T* nearest) {
  std::fill(nearest, nearest + n, -std::numeric_limits<T>::infinity());
  raise_nearest(s, ld, 0, n, nu, n, crew, nearest);
  return farthest(nu, n, nearest);
}

// What is due beyond the candidates: tier 1 by index, then tier 2, then -1, as only tier 3 is left.
template <class T>
void fill_by_index(const Selection<T>& selection, int64_t n, int64_t picks, int64_t k, int64_t* order) {
  int64_t step = picks;
  for (const int8_t leftover : {kNonFinite, kMasked}) {
    for (int64_t i = 0; selection.tier && i < n && step < k; ++i) {
      if (selection.tier[i] == leftover && selection.may_be_picked(i)) order[step++] = i;
    }
  }
  std::fill(order + step, order + k, -1);
}

}  // namespace

namespace {

// The picks after the first `made`, whose last one may have been seen in m or not.
template <class T>
void pick_on(const T* s, int64_t ld, const Selection<T>& selection, int64_t n, int64_t made, int64_t picks,
             const GreedyMemory<T>& memory, int64_t* order) {
  const RowOps<T>& ops = row_ops<T>();
  const auto [nu, m] = memory;
  for (int64_t step = made; step < picks; ++step) {
    order[step] = ops.next_pick(s + order[step - 1] * ld, nu, selection.suppression, selection.combine, n, m);
    nu[order[step]] = std::numeric_limits<T>::quiet_NaN();
  }
}

}  // namespace

template <class T>
void greedy_select_image(const T* s, int64_t ld, const Selection<T>& selection, bool max_min, int64_t n, int64_t k,
                         Crew& crew, const GreedyMemory<T>& memory, int64_t* order) {
  const auto [nu, m] = memory;
  const int64_t picks = std::min(k, negate_utility(selection, n, nu));
  if (picks > 0) {
    order[0] = max_min ? pick_farthest(s, ld, nu, n, crew, m) : pick_first(selection, nu, n, m);
    nu[order[0]] = std::numeric_limits<T>::quiet_NaN();
  }
  std::fill(m, m + n, -std::numeric_limits<T>::infinity());
  pick_on(s, ld, selection, n, 1, picks, memory, order);
  fill_by_index(selection, n, picks, k, order);
}

template <class T>
void greedy_select_resumed(const T* s, int64_t ld, const Selection<T>& selection, int64_t n, int64_t made, int64_t k,
                           const GreedyMemory<T>& memory, int64_t* order) {
  const auto is_live = [](T nu) { return !std::isnan(nu); };
  const int64_t picks = std::min(k, made + std::count_if(memory.nu, memory.nu + n, is_live));
  pick_on(s, ld, selection, n, made, picks, memory, order);
  fill_by_index(selection, n, picks, k, order);
}

// Exact lazy batching. Once the first pick is made scores only fall (t only rises), so an old t is a bound: as long as
// the best of a pool of exact scores comes before the best old one outside, it is the pick, whatever the new scores
// outside may be. Then all scores are brought up to date with the round's picks at once, by one product.
namespace {

template <class T>
struct Pool {
  const GreedyMemory<T>& all;
  const StreamedGreedyMemory<T>& memory;
  int64_t most;  // tokens of a round
  int64_t size = 0;
  T bound{};                 // t and index of the best token outside
  int64_t bound_token = -1;  // -1: nobody is outside

  // By score, then by index: ties go to the lowest index, in the pool and across its border.
  static bool before(T t, int64_t i, T u, int64_t j) { return t < u || (t == u && i < j); }

  // The best candidates by t, in token order.
  void fill(int64_t n) {
    int64_t* tokens = memory.tokens;
    int64_t live = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isnan(memory.t[i])) tokens[live++] = i;
    }
    size = std::min(live, most);
    bound_token = -1;
    if (live > size) {
      std::nth_element(tokens, tokens + size, tokens + live,
                       [&](int64_t i, int64_t j) { return before(memory.t[i], i, memory.t[j], j); });
      bound_token = tokens[size];
      bound = memory.t[bound_token];
    }
    std::sort(tokens, tokens + size);
    for (int64_t i = 0; i < size; ++i) {
      memory.pool.nu[i] = all.nu[tokens[i]];
      memory.pool.m[i] = all.m[tokens[i]];
      memory.pool_t[i] = memory.t[tokens[i]];
    }
  }

  // Picks at most `most` tokens; the first of a round always comes before the bound.
  int64_t pick(T suppression, Combine combine, int64_t most, int64_t* order) {
    const RowOps<T>& ops = row_ops<T>();
    const auto [nu, m] = memory.pool;
    int64_t best = ops.first_pick(memory.pool_t, size), picks = 0;
    T t = memory.pool_t[best];
    while (true) {
      const int64_t token = memory.tokens[best];
      if (bound_token >= 0 && !before(t, token, bound, bound_token)) return picks;
      order[picks++] = token;
      nu[best] = all.nu[token] = std::numeric_limits<T>::quiet_NaN();
      if (picks == most || picks == size) return picks;
      best = ops.next_pick(memory.square + best * size, nu, suppression, combine, size, m);
      ops.score_row(m + best, nu + best, suppression, combine, 1, &t);
    }
  }
};

}  // namespace

template <class T>
StreamedGreedyMemory<T>::StreamedGreedyMemory(Memory& memory, int64_t n, int64_t most)
    : most(std::min(n, most)),
      all(memory, n),
      pool(memory, this->most),
      t(memory.take<T>(n)),
      pool_t(memory.take<T>(this->most)),
      square(memory.take<T>(this->most, this->most)),
      tokens(memory.take<int64_t>(n)) {}

template <class T>
int64_t greedy_select_streamed(const Rows& keys, const Selection<T>& selection, int64_t k, Crew& crew,
                               SimilarityMemory<T>& similarity, const StreamedGreedyMemory<T>& memory, int64_t* order,
                               T* rows, Rounds rounds) {
  const RowOps<T>& ops = row_ops<T>();
  const T suppression = selection.suppression;
  const Combine combine = selection.combine;
  const int64_t n = keys.n, width = width_of(n);
  T *nu = memory.all.nu, *m = memory.all.m;
  const int64_t picks = std::min(k, negate_utility(selection, n, nu));

  // Brings all scores up to date with the picks [from, to).
  const auto update = [&](int64_t from, int64_t to) {
    T* fresh = rows + (rounds.keep_rows ? from * width : 0);
    similarity_rows(keys, order + from, to - from, crew, similarity, fresh);
    crew.run([&](int slot) {
      const Share share(n, slot, crew.size());
      const int64_t lo = share.lo, length = share.hi - lo;
      for (int64_t i = 0; i < to - from; ++i) ops.raise_row(fresh + i * width + lo, length, m + lo);
      ops.score_row(m + lo, nu + lo, suppression, combine, length, memory.t + lo);
    });
  };
  if (picks > 0) {  // alone: without it m is nothing, and a negative cosine would raise a score
    order[0] = pick_first(selection, nu, n, m);
    std::fill(m, m + n, -std::numeric_limits<T>::infinity());
    nu[order[0]] = std::numeric_limits<T>::quiet_NaN();
    update(0, 1);
  }
  Pool<T> pool{memory.all, memory, std::min(memory.most, pool_of(n, k))};
  for (int64_t step = 1; step < picks;) {
    if (rounds.most-- == 0) return step;
    pool.fill(n);
    similarity_among(keys, memory.tokens, pool.size, crew, similarity, memory.square);
    const int64_t more = pool.pick(suppression, combine, picks - step, order + step);
    update(step, step + more);
    step += more;
  }
  fill_by_index(selection, n, picks, k, order);
  return picks;
}

template <class T>
int64_t pick_farthest_streamed(const Rows& keys, const Selection<T>& selection, Crew& crew,
                               SimilarityMemory<T>& similarity, const GreedyMemory<T>& memory, T* rows) {
  const auto [nu, nearest] = memory;
  const int64_t n = keys.n;
  if (negate_utility(selection, n, nu) == 0) return -1;
  std::fill(nearest, nearest + n, -std::numeric_limits<T>::infinity());
  int64_t tokens[kTile];
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t count = std::min<int64_t>(kTile, n - first);
    std::iota(tokens, tokens + count, first);
    similarity_rows(keys, tokens, count, crew, similarity, rows);
    raise_nearest(rows, width_of(n), first, count, nu, n, crew, nearest);
  }
  return farthest(nu, n, nearest);
}

#define CONDENSE_INSTANTIATE(T)                                                                                      \
  template struct StreamedGreedyMemory<T>;                                                                           \
  template void greedy_select_image<T>(const T*, int64_t, const Selection<T>&, bool, int64_t, int64_t, Crew&,        \
                                       const GreedyMemory<T>&, int64_t*);                                            \
  template void greedy_select_resumed<T>(const T*, int64_t, const Selection<T>&, int64_t, int64_t, int64_t,          \
                                         const GreedyMemory<T>&, int64_t*);                                          \
  template int64_t greedy_select_streamed<T>(const Rows&, const Selection<T>&, int64_t, Crew&, SimilarityMemory<T>&, \
                                             const StreamedGreedyMemory<T>&, int64_t*, T*, Rounds);                  \
  template int64_t pick_farthest_streamed<T>(const Rows&, const Selection<T>&, Crew&, SimilarityMemory<T>&,          \
                                             const GreedyMemory<T>&, T*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

namespace {

// One pick comes after the other; the search for the nearest neighbours is shared.
Work greedy_work(int64_t n, int64_t k, bool max_min) {
  const auto tokens = static_cast<double>(n), shared = max_min ? tokens * tokens : 0;
  return {tokens * static_cast<double>(k) + shared, shared};
}

template <class T>
Tensor greedy_select_as(const Tensor& s, const std::optional<Tensor>& prior, int64_t k, const Options& options) {
  const int64_t B = s.size(0), N = s.size(1);
  const Matrices matrices(s.scalar_type() == kScalarType<T> ? s : contiguous_as("s", s, kScalarType<T>));
  const Arguments<T> arguments(prior, options);
  if (arguments.has_index) check_values("first", data_of<int64_t>(*arguments.first), B, -1, N);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int) { return GreedyMemory<T>(memory, N); };
  for_each_image(B, greedy_work(N, k, options.max_min), pieces, [&](int64_t b, auto& memory, Crew& crew) {
    greedy_select_image<T>(matrices.at<T>(b), matrices.ld, arguments.image(b, b * N), options.max_min, N, k, crew,
                           memory, output<int64_t>(order) + b * k);
  });
  return order;
}

Tensor greedy_select(const Tensor& s, std::optional<Tensor> prior, int64_t k, std::optional<Tensor> sbar,
                     std::optional<Tensor> tier, double suppression, std::optional<Tensor> first,
                     std::optional<Tensor> candidates, Text combine, bool max_min) {
  check_rank("s", s, "B N N", 3);
  check_shape("s", s, "B N N", {s.size(0), s.size(1), s.size(1)});
  check_working("s", s);
  check_num_tokens("s", s);
  const std::vector<int64_t> tokens = {s.size(0), s.size(1)};
  if (prior) {
    check_shape("prior", *prior, "B N", tokens);
    check_floating("prior", *prior);
  }
  check_count("k", k, s.size(1));
  const Options options{sbar, tier, first, candidates, suppression, combine_of(combine), max_min};
  check_options(options, "B", {s.size(0)}, "B N", tokens);
  const bool wide = is_double(s) || (prior && is_double(*prior));
  return wide ? greedy_select_as<double>(s, prior, k, options) : greedy_select_as<float>(s, prior, k, options);
}

template <class T>
Tensor greedy_select_varlen_as(const Tensor& s, const std::optional<Tensor>& prior, const Tensor& cu_seqlens,
                               const Tensor& cu_kept, int64_t total_keep, int64_t max_seqlen, const Options& options) {
  const bool fits = s.scalar_type() == kScalarType<T> && (s.stride(1) == 1 || s.size(1) == 1);
  const Tensor rows = fits ? s : contiguous_as("s", s, kScalarType<T>);
  const Arguments<T> arguments(prior, options);
  const Tensor order = empty("order", {total_keep}, ScalarType::Long);
  auto* picks = output<int64_t>(order);
  std::fill(picks, picks + total_keep, -1);
  const std::vector<Part> parts = parts_of(cu_seqlens, cu_kept, s.size(0), total_keep, max_seqlen);
  Work work = 0;
  for (const Part& part : parts) {
    const int64_t n = part.num_tokens;
    work += greedy_work(n, part.num_rows, options.max_min);
    if (arguments.has_index) check_values("first", data_of<int64_t>(*arguments.first) + part.number, 1, -1, n);
  }
  const auto count = static_cast<int64_t>(parts.size());
  const auto pieces = [&](Memory& memory, int) { return GreedyMemory<T>(memory, longest(parts)); };
  for_each_image(count, work / count, pieces, [&](int64_t i, auto& memory, Crew& crew) {
    const Part& part = parts[i];
    const int64_t first = part.first_token, ld = rows.stride(0);
    greedy_select_image<T>(data_of<T>(rows) + first * ld, ld, arguments.image(part.number, first), options.max_min,
                           part.num_tokens, part.num_rows, crew, memory, picks + part.first_row);
  });
  return order;
}

Tensor greedy_select_varlen(const Tensor& s, std::optional<Tensor> prior, const Tensor& cu_seqlens,
                            const Tensor& cu_kept, int64_t total_keep, int64_t max_seqlen, std::optional<Tensor> sbar,
                            std::optional<Tensor> tier, double suppression, std::optional<Tensor> first,
                            std::optional<Tensor> candidates, Text combine, bool max_min) {
  check_rank("s", s, "T max_seqlen", 2);
  check_working("s", s);
  check_segments(cu_seqlens, max_seqlen);
  const std::vector<int64_t> tokens = {s.size(0)}, segments = {cu_seqlens.size(0) - 1};
  if (s.size(1) != max_seqlen) {
    fail("s: expected shape [T max_seqlen] = ", shape_text({s.size(0), max_seqlen}), ", got ", shape_text(shape_of(s)),
         ".");
  }
  if (prior) {
    check_shape("prior", *prior, "T", tokens);
    check_floating("prior", *prior);
  }
  check_rows(cu_kept, cu_seqlens, total_keep, s.size(0));
  const Options options{sbar, tier, first, candidates, suppression, combine_of(combine), max_min};
  check_options(options, "S", segments, "T", tokens);
  const bool wide = is_double(s) || (prior && is_double(*prior));
  const auto run = wide ? greedy_select_varlen_as<double> : greedy_select_varlen_as<float>;
  return run(s, prior, cu_seqlens, cu_kept, total_keep, max_seqlen, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("greedy_select", TORCH_BOX(&greedy_select));
  m.impl("greedy_select_varlen", TORCH_BOX(&greedy_select_varlen));
}

}  // namespace condense
