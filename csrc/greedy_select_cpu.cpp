// The greedy, similarity-suppressed selection of Eq. 2 and Eq. 4: one pass over a row of s for each pick.
#include <torch/csrc/stable/library.h>

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

}  // namespace

template <class T>
void greedy_select_image(const T* s, int64_t ld, const T* prior, const T* sbar, const int8_t* tier, int64_t n,
                         int64_t k, T suppression, int64_t* order) {
  constexpr T kMax = std::numeric_limits<T>::max();
  const RowOps<T>& ops = row_ops<T>();
  Buffer<T> nu(n), m(n);
  if (sbar) {
    scale_prior(prior, *sbar, tier, n, nu.get());
  } else {
    for (int64_t i = 0; i < n; ++i) nu[i] = 0 - prior[i];
  }
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) {
    m[i] = -std::numeric_limits<T>::infinity();
    if (tier && tier[i] != kValid) {
      nu[i] = std::numeric_limits<T>::quiet_NaN();  // no candidate
    } else {
      nu[i] = std::isnan(nu[i]) ? kMax : std::clamp(nu[i], -kMax, kMax);
      ++candidates;
    }
  }
  const int64_t picks = std::min(k, candidates);
  for (int64_t step = 0; step < picks; ++step) {
    const int64_t pick = step == 0 ? ops.first_pick(nu.get(), n)
                                   : ops.next_pick(s + order[step - 1] * ld, nu.get(), suppression, n, m.get());
    order[step] = pick;
    nu[pick] = std::numeric_limits<T>::quiet_NaN();
  }
  int64_t step = picks;
  for (const int8_t leftover : {kNonFinite, kMasked}) {
    for (int64_t i = 0; tier && i < n && step < k; ++i) {
      if (tier[i] == leftover) order[step++] = i;
    }
  }
  std::fill(order + step, order + k, -1);  // only tier 3 is left
}

template void greedy_select_image<float>(const float*, int64_t, const float*, const float*, const int8_t*, int64_t,
                                         int64_t, float, int64_t*);
template void greedy_select_image<double>(const double*, int64_t, const double*, const double*, const int8_t*, int64_t,
                                          int64_t, double, int64_t*);

namespace {

template <class T>
Tensor greedy_select_as(const Tensor& s, const Tensor& prior, int64_t k, const std::optional<Tensor>& sbar,
                        const std::optional<Tensor>& tier, double suppression) {
  const int64_t B = s.size(0), N = s.size(1);
  const Matrices matrices(s.scalar_type() == kScalarType<T> ? s : contiguous_as(s, kScalarType<T>));
  const Tensor a = contiguous_as(prior, kScalarType<T>);
  const auto mean = contiguous_as(sbar, kScalarType<T>);
  const auto tiers = contiguous_as(tier, ScalarType::Char);
  const Tensor order = torch::stable::empty({B, k}, ScalarType::Long);
  for_each_image(B, N * k, [&](int64_t b, int) {
    greedy_select_image<T>(matrices.at<T>(b), matrices.ld, data_of<T>(a) + b * N, row_of<T>(mean, b, 1),
                           row_of<int8_t>(tiers, b, N), N, k, static_cast<T>(suppression),
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
