// The greedy, similarity-suppressed selection of Eq. 2 and Eq. 4: one pass over a row of s for each pick.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

// nu = -u with u = E|S| / E|prior| * prior; the mean over tiers 0 and 3 as a sum of integers, so its order is free.
template <class T>
void scale_prior(const T* prior, T sbar, const int8_t* tier, int64_t n, T* nu) {
  const auto counted = [&](int64_t i) { return !tier || tier[i] == kValid || tier[i] == kTaken; };
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
  const T ratio = static_cast<T>(static_cast<double>(sbar) / mean);
  for (int64_t i = 0; i < n; ++i) nu[i] = 0 - ratio * nu[i];
}

// nu of every token, NaN where it is no candidate; returns how many are. Where nothing is suppressed there is nothing
// to scale for: sbar may be 0, and a rounded u would tie what the prior does not.
template <class T>
int64_t negate_utility(const T* prior, const T* sbar, const int8_t* tier, T suppression, int64_t n, T* nu) {
  constexpr T kMax = std::numeric_limits<T>::max();
  if (sbar && suppression != 0) {
    scale_prior(prior, *sbar, tier, n, nu);
  } else {
    for (int64_t i = 0; i < n; ++i) nu[i] = 0 - prior[i];
  }
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (tier && tier[i] != kValid) {
      nu[i] = std::numeric_limits<T>::quiet_NaN();
    } else {
      nu[i] = std::isnan(nu[i]) ? kMax : std::clamp(nu[i], -kMax, kMax);
      ++candidates;
    }
  }
  return candidates;
}

// What is due beyond the candidates: tier 1 by index, then tier 2, then -1, as only tier 3 is left.
void fill_by_index(const int8_t* tier, int64_t n, int64_t picks, int64_t k, int64_t* order) {
  int64_t step = picks;
  for (const int8_t leftover : {kNonFinite, kMasked}) {
    for (int64_t i = 0; tier && i < n && step < k; ++i) {
      if (tier[i] == leftover) order[step++] = i;
    }
  }
  std::fill(order + step, order + k, -1);
}

}  // namespace

template <class T>
void greedy_select_image(const T* s, int64_t ld, const T* prior, const T* sbar, const int8_t* tier, int64_t n,
                         int64_t k, T suppression, const GreedyMemory<T>& memory, int64_t* order) {
  const RowOps<T>& ops = row_ops<T>();
  const auto [nu, m] = memory;
  const int64_t picks = std::min(k, negate_utility(prior, sbar, tier, suppression, n, nu));
  std::fill(m, m + n, -std::numeric_limits<T>::infinity());
  for (int64_t step = 0; step < picks; ++step) {
    const int64_t pick =
        step == 0 ? ops.first_pick(nu, n) : ops.next_pick(s + order[step - 1] * ld, nu, suppression, n, m);
    order[step] = pick;
    nu[pick] = std::numeric_limits<T>::quiet_NaN();
  }
  fill_by_index(tier, n, picks, k, order);
}

// Exact lazy batching. Once the first pick is made scores only fall (t only rises), so an old t is a bound: as long as
// the best of a pool of exact scores comes before the best old one outside, it is the pick, whatever the new scores
// outside may be. Then all scores are brought up to date with the round's picks at once, by one product.
namespace {

constexpr int64_t kPool = 512;  // tokens: 1 MB of similarities among them

template <class T>
struct Pool {
  const GreedyMemory<T>& all;
  const StreamedGreedyMemory<T>& memory;
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
    size = std::min(live, kPool);
    bound_token = -1;
    if (live > kPool) {
      std::nth_element(tokens, tokens + kPool, tokens + live,
                       [&](int64_t i, int64_t j) { return before(memory.t[i], i, memory.t[j], j); });
      bound_token = tokens[kPool];
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
  int64_t pick(T suppression, int64_t most, int64_t* order) {
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
      best = ops.next_pick(memory.square + best * size, nu, suppression, size, m);
      t = suppression * m[best] + nu[best];
    }
  }
};

}  // namespace

template <class T>
StreamedGreedyMemory<T>::StreamedGreedyMemory(Memory& memory, int64_t n)
    : all(memory, n),
      pool(memory, std::min(n, kPool)),
      t(memory.take<T>(n)),
      pool_t(memory.take<T>(std::min(n, kPool))),
      square(memory.take<T>(std::min(n, kPool) * std::min(n, kPool))),
      tokens(memory.take<int64_t>(n)) {}

template <class T>
int64_t greedy_select_streamed(const Rows& keys, const T* prior, const T* sbar, const int8_t* tier, int64_t k,
                               T suppression, Crew& crew, SimilarityMemory<T>& similarity,
                               const StreamedGreedyMemory<T>& memory, int64_t* order, T* rows) {
  const RowOps<T>& ops = row_ops<T>();
  const int64_t n = keys.n, width = width_of(n);
  T *nu = memory.all.nu, *m = memory.all.m;
  const int64_t picks = std::min(k, negate_utility(prior, sbar, tier, suppression, n, nu));
  std::fill(m, m + n, -std::numeric_limits<T>::infinity());

  // Brings all scores up to date with the picks [from, to).
  const auto update = [&](int64_t from, int64_t to) {
    similarity_rows(keys, order + from, to - from, crew, similarity, rows + from * width);
    crew.run([&](int slot) {
      const Share share(n, slot, crew.size());
      const int64_t lo = share.lo, length = share.hi - lo;
      for (int64_t step = from; step < to; ++step) ops.raise_row(rows + step * width + lo, length, m + lo);
      ops.score_row(m + lo, nu + lo, suppression, length, memory.t + lo);
    });
  };
  if (picks > 0) {  // alone: without it m is nothing, and a negative cosine would raise a score
    order[0] = ops.first_pick(nu, n);
    nu[order[0]] = std::numeric_limits<T>::quiet_NaN();
    update(0, 1);
  }
  Pool<T> pool{memory.all, memory};
  for (int64_t step = 1; step < picks;) {
    pool.fill(n);
    similarity_among(keys, memory.tokens, pool.size, crew, similarity, memory.square);
    const int64_t more = pool.pick(suppression, picks - step, order + step);
    update(step, step + more);
    step += more;
  }
  fill_by_index(tier, n, picks, k, order);
  return picks;
}

#define CONDENSE_INSTANTIATE(T)                                                                                   \
  template struct StreamedGreedyMemory<T>;                                                                        \
  template void greedy_select_image<T>(const T*, int64_t, const T*, const T*, const int8_t*, int64_t, int64_t, T, \
                                       const GreedyMemory<T>&, int64_t*);                                         \
  template int64_t greedy_select_streamed<T>(const Rows&, const T*, const T*, const int8_t*, int64_t, T, Crew&,   \
                                             SimilarityMemory<T>&, const StreamedGreedyMemory<T>&, int64_t*, T*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

namespace {

template <class T>
Tensor greedy_select_as(const Tensor& s, const Tensor& prior, int64_t k, const std::optional<Tensor>& sbar,
                        const std::optional<Tensor>& tier, double suppression) {
  const int64_t B = s.size(0), N = s.size(1);
  const Matrices matrices(s.scalar_type() == kScalarType<T> ? s : contiguous_as("s", s, kScalarType<T>));
  const Tensor a = contiguous_as("prior", prior, kScalarType<T>);
  const auto mean = contiguous_as("sbar", sbar, kScalarType<T>);
  const auto tiers = contiguous_as("tier", tier, ScalarType::Char);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int) { return GreedyMemory<T>(memory, N); };
  for_each_image(B, N * k, pieces, [&](int64_t b, auto& memory, Crew&) {
    greedy_select_image<T>(matrices.at<T>(b), matrices.ld, data_of<T>(a) + b * N, row_of<T>(mean, b, 1),
                           row_of<int8_t>(tiers, b, N), N, k, static_cast<T>(suppression), memory,
                           output<int64_t>(order) + b * k);
  });
  return order;
}

Tensor greedy_select(const Tensor& s, const Tensor& prior, int64_t k, std::optional<Tensor> sbar,
                     std::optional<Tensor> tier, double suppression) {
  check_rank("s", s, "B N N", 3);
  check_shape("s", s, "B N N", {s.size(0), s.size(1), s.size(1)});
  check_working("s", s);
  check_num_tokens("s", s);
  const std::vector<int64_t> tokens = {s.size(0), s.size(1)};
  check_shape("prior", prior, "B N", tokens);
  check_floating("prior", prior);
  check_count("k", k, s.size(1));
  if (sbar) {
    check_shape("sbar", *sbar, "B", {s.size(0)});
    check_working("sbar", *sbar);
  }
  if (tier) {
    check_shape("tier", *tier, "B N", tokens);
    check_dtype("tier", *tier, {ScalarType::Char}, "int8");
  }
  check_weight("suppression", suppression);
  const bool wide = is_double(s) || is_double(prior);
  return wide ? greedy_select_as<double>(s, prior, k, sbar, tier, suppression)
              : greedy_select_as<float>(s, prior, k, sbar, tier, suppression);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("greedy_select", TORCH_BOX(&greedy_select)); }

}  // namespace condense
