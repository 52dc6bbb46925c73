// Greedy MAP inference of a determinantal point process (Chen, Zhang, Zhou 2018).
//
// Exact lazy batching: gains only fall, so an old gain is a bound. Picks are made from a pool of the tokens with the
// largest gains, as long as the best of them comes before the best old gain outside; then all tokens are brought up to
// date with the round's picks at once, which reads the factor once for four of them.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "dpp_select.h"

namespace condense {

template <class T>
DppMemory<T>::DppMemory(Memory& memory, int64_t n, int64_t k)
    : all(memory, n, k),
      pool(memory, n <= kDppAlone ? 0 : kDppPool, k),
      worth(memory.take<T>(n)),
      open(memory.take<uint8_t>(n)),
      tokens(memory.take<int64_t>(n)),
      picked(memory.take<T>(n <= kDppAlone ? 1 : kDppPool, k)),
      root(memory.take<T>(kDppPool)),
      of_picked(memory.take<T>(kDppPool)),
      row(memory.take<T>(kDppPool)) {}

namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
T finite_or_zero(T x) {
  return std::isfinite(x) ? x : T{0};
}

// By gain, then by index.
template <class T>
bool comes_before(T gain, int64_t i, T other, int64_t j) {
  return gain > other || (gain == other && i < j);
}

// Where similarities come from: a matrix that is stored,
template <class T>
struct StoredRows {
  const T* s;
  int64_t ld;

  void read_diagonal(int64_t n, T* diagonal) {
    for (int64_t i = 0; i < n; ++i) diagonal[i] = finite_or_zero(s[i * (ld + 1)]);
  }
  void prepare(const int64_t*, int64_t) {}
  // Of a token, to those of the pool.
  const T* in_pool(const int64_t* tokens, int64_t size, int64_t i, T* row) {
    const T* whole = s + tokens[i] * ld;
    for (int64_t j = 0; j < size; ++j) row[j] = whole[tokens[j]];
    return row;
  }
  void fetch(const int64_t*, int64_t) {}
  const T* whole(const int64_t* picks, int64_t i) { return s + picks[i] * ld; }
};

// or keys, as rows are needed.
template <class T>
struct KeyRows {
  const Rows& keys;
  Crew& crew;
  SimilarityMemory<T>& memory;
  T *square, *rows;  // [pool, pool], [pool, width]

  void read_diagonal(int64_t, T* diagonal) { similarity_diagonal(keys, crew, memory, diagonal); }
  void prepare(const int64_t* tokens, int64_t size) { similarity_among(keys, tokens, size, crew, memory, square); }
  const T* in_pool(const int64_t*, int64_t size, int64_t i, T*) { return square + i * size; }
  void fetch(const int64_t* picks, int64_t count) { similarity_rows(keys, picks, count, crew, memory, rows); }
  const T* whole(const int64_t*, int64_t i) { return rows + i * width_of(keys.n); }
};

template <class T, class Source>
class Loop {
 public:
  Loop(Source& source, const Dpp<T>& dpp, int64_t n, int64_t k, Crew& crew, const DppMemory<T>& memory, int64_t* order)
      : source_(source), dpp_(dpp), n_(n), k_(k), crew_(crew), memory_(memory), order_(order) {}

  // Returns how many picks add to the volume.
  int64_t run() {
    start();
    int64_t step = 0;
    if (n_ <= kDppAlone) {
      const auto row_of = [&](int64_t best) { return source_.whole(&best, 0); };
      return pick(memory_.all, n_, nullptr, row_of, 0);
    }
    while (step < k_ && fill_pool(step)) {
      source_.prepare(memory_.tokens, size_);
      const auto row_of = [&](int64_t best) { return source_.in_pool(memory_.tokens, size_, best, memory_.row); };
      const int64_t end = pick(memory_.pool, size_, memory_.tokens, row_of, step);
      if (end < k_) bring_up_to_date(step, end);
      step = end;
    }
    return step;
  }

 private:
  // No candidate among so many tokens and those that fill the last block.
  static void clear(const Factored<T>& some, int64_t size) {
    const int64_t padded = blocks_of(size) * kFactorBlock;
    std::fill(some.gain, some.gain + padded, T{0});
    std::fill(some.quality, some.quality + padded, T{0});
    std::fill(some.floor, some.floor + padded, kInfinity<T>);
  }

  void start() {
    const Factored<T>& all = memory_.all;
    clear(all, n_);
    source_.read_diagonal(n_, all.gain);
    for (int64_t i = 0; i < n_; ++i) {
      memory_.worth[i] = all.gain[i];
      if (dpp_.quality) {
        const T q = finite_or_zero(dpp_.quality[i]);
        memory_.worth[i] = all.quality[i] = q;
        all.gain[i] = q * all.gain[i] * q;
      }
      memory_.open[i] = dpp_.is_candidate(i);
      const T floor = dpp_.eps * all.gain[i];
      if (memory_.open[i]) all.floor[i] = floor > 0 ? floor : T{0};
    }
  }

  // The tokens with the largest gains, in token order; false where nobody is left that adds anything.
  bool fill_pool(int64_t done) {
    const Factored<T>&all = memory_.all, &pool = memory_.pool;
    int64_t* tokens = memory_.tokens;
    int64_t live = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (all.gain[i] > all.floor[i]) tokens[live++] = i;
    }
    size_ = std::min(live, kDppPool);
    bound_token_ = -1;
    if (live > size_) {
      std::nth_element(tokens, tokens + size_, tokens + live,
                       [&](int64_t i, int64_t j) { return comes_before(all.gain[i], i, all.gain[j], j); });
      bound_token_ = tokens[size_];
      bound_ = all.gain[bound_token_];
    }
    std::sort(tokens, tokens + size_);
    clear(pool, size_);
    for (int64_t j = 0; j < size_; ++j) {
      pool.gain[j] = all.gain[tokens[j]];
      pool.floor[j] = all.floor[tokens[j]];
      pool.quality[j] = all.quality[tokens[j]];
    }
    for (int64_t block = 0; block < blocks_of(size_); ++block) {
      const int64_t first = block * kFactorBlock, filled = std::min<int64_t>(kFactorBlock, size_ - first);
      const T* column[kFactorBlock];
      for (int64_t j = 0; j < filled; ++j) column[j] = &all.at(0, tokens[first + j]);
      T* rows = pool.rows_of(block);
      for (int64_t u = 0; u < done; ++u) {
        for (int64_t j = 0; j < filled; ++j) rows[u * kFactorBlock + j] = column[j][u * kFactorBlock];
        std::fill(rows + u * kFactorBlock + filled, rows + (u + 1) * kFactorBlock, T{0});
      }
    }
    return size_ > 0;
  }

  // Picks from `some` until the bound comes first, nobody is left or all are picked that are due; returns how many
  // picks there are then. The first of a round always comes before the bound. tokens null: they are numbered as all.
  template <class RowOf>
  int64_t pick(const Factored<T>& some, int64_t size, const int64_t* tokens, const RowOf& row_of, int64_t first) {
    const RowOps<T>& ops = row_ops<T>();
    int64_t step = first;
    while (true) {
      const int64_t best = ops.best_gain(some.gain, some.floor, blocks_of(size) * kFactorBlock);
      if (best < 0) return step;
      const int64_t token = tokens ? tokens[best] : best;
      const bool outside_first =
          tokens && bound_token_ >= 0 && !comes_before(some.gain[best], token, bound_, bound_token_);
      if (outside_first && step > first) return step;
      order_[step] = token;
      memory_.open[token] = 0;
      some.floor[best] = memory_.all.floor[token] = kInfinity<T>;
      const int64_t place = tokens ? step - first : 0;
      T* picked = memory_.picked + place * k_;
      for (int64_t u = 0; u < step; ++u) picked[u] = some.at(u, best);
      memory_.root[place] = std::sqrt(some.gain[best] + dpp_.damping);
      memory_.of_picked[place] = some.quality[best];
      if (++step == k_) return step;
      const T* row = row_of(best);
      for (int64_t block = 0; block < blocks_of(size); ++block) {
        add_rows(some, size, block, &row, step - 1, place, 1);
      }
    }
  }

  // Rows [done, done + count) of the factor of one block of `some`, for the round's picks from `place` on.
  void add_rows(const Factored<T>& some, int64_t size, int64_t block, const T* const* rows, int64_t done, int64_t place,
                int count) {
    const int64_t first = block * kFactorBlock, filled = std::min<int64_t>(kFactorBlock, size - first);
    T padded[kFactorRows][kFactorBlock];
    FactorRows<T> task;
    task.done = done;
    task.count = count;
    task.quality = dpp_.quality ? some.quality + first : nullptr;
    for (int r = 0; r < count; ++r) {
      task.rows[r] = rows[r] + first;
      if (filled < kFactorBlock) {
        std::copy(rows[r] + first, rows[r] + size, padded[r]);
        std::fill(padded[r] + filled, padded[r] + kFactorBlock, T{0});
        task.rows[r] = padded[r];
      }
      task.picked_quality[r] = memory_.of_picked[place + r];
      task.picked[r] = memory_.picked + (place + r) * k_;
      task.root[r] = memory_.root[place + r];
    }
    row_ops<T>().factor_rows(task, some.rows_of(block), some.gain + first);
  }

  // All tokens, with the picks [from, to) of a round.
  void bring_up_to_date(int64_t from, int64_t to) {
    const int64_t* picks = order_ + from;
    source_.fetch(picks, to - from);
    crew_.run([&](int slot) {
      const Share share(blocks_of(n_), slot, crew_.size());
      for (int64_t block = share.lo; block < share.hi; ++block) {
        for (int64_t place = 0; place < to - from; place += kFactorRows) {
          const int count = static_cast<int>(std::min<int64_t>(kFactorRows, to - from - place));
          const T* rows[kFactorRows];
          for (int r = 0; r < count; ++r) rows[r] = source_.whole(picks, place + r);
          add_rows(memory_.all, n_, block, rows, from + place, place, count);
        }
      }
    });
  }

  Source& source_;
  const Dpp<T>& dpp_;
  const int64_t n_, k_;
  Crew& crew_;
  const DppMemory<T>& memory_;
  int64_t* order_;
  int64_t size_ = 0;          // of the pool
  T bound_{};                 // the largest gain outside of it,
  int64_t bound_token_ = -1;  // and whose it is; -1: nobody is outside
};

// What is due beyond: the rest of tier 0 by worth, then tier 1 by index, then tier 2, then -1.
template <class T>
void fill_order(const Dpp<T>& dpp, int64_t n, int64_t picks, int64_t k, const DppMemory<T>& memory, int64_t* order) {
  if (picks == k) return;
  int64_t* rest = memory.tokens;
  int64_t left = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (memory.open[i]) rest[left++] = i;
  }
  const int64_t due = std::min(left, k - picks);
  std::partial_sort(rest, rest + due, rest + left,
                    [&](int64_t i, int64_t j) { return comes_before(memory.worth[i], i, memory.worth[j], j); });
  int64_t step = std::copy(rest, rest + due, order + picks) - order;
  for (const int8_t leftover : {kNonFinite, kMasked}) {
    for (int64_t i = 0; dpp.tier && i < n && step < k; ++i) {
      if (dpp.tier[i] == leftover && dpp.may_be_picked(i)) order[step++] = i;
    }
  }
  std::fill(order + step, order + k, -1);
}

template <class T, class Source>
void select(Source source, const Dpp<T>& dpp, int64_t n, int64_t k, Crew& crew, const DppMemory<T>& memory,
            int64_t* order) {
  if (k == 0) return;
  const int64_t picks = Loop<T, Source>(source, dpp, n, k, crew, memory, order).run();
  fill_order(dpp, n, picks, k, memory, order);
}

}  // namespace

template <class T>
void dpp_select_image(const T* s, int64_t ld, const Dpp<T>& dpp, int64_t n, int64_t k, Crew& crew,
                      const DppMemory<T>& memory, int64_t* order) {
  select(StoredRows<T>{s, ld}, dpp, n, k, crew, memory, order);
}

#define CONDENSE_INSTANTIATE(T)                                                                                     \
  template struct DppMemory<T>;                                                                                     \
  template void dpp_select_image<T>(const T*, int64_t, const Dpp<T>&, int64_t, int64_t, Crew&, const DppMemory<T>&, \
                                    int64_t*);
CONDENSE_INSTANTIATE(float)
CONDENSE_INSTANTIATE(double)
#undef CONDENSE_INSTANTIATE

void DppOptions::check(const char* axes, const std::vector<int64_t>& tokens) const {
  if (quality) {
    check_shape("quality", *quality, axes, tokens);
    check_floating("quality", *quality);
  }
  if (tier) {
    check_shape("tier", *tier, axes, tokens);
    check_dtype("tier", *tier, {ScalarType::Char}, "int8");
  }
  if (candidates) {
    check_shape("candidates", *candidates, axes, tokens);
    check_dtype("candidates", *candidates, {ScalarType::Bool}, "bool");
  }
  check_weight("eps", eps);
  check_weight("damping", damping);
}

namespace {

template <class T>
Tensor dpp_select_as(const Tensor& s, int64_t k, const DppOptions& options) {
  const int64_t B = s.size(0), N = s.size(1);
  const Matrices matrices(s.scalar_type() == kScalarType<T> ? s : contiguous_as("s", s, kScalarType<T>));
  const DppArguments<T> arguments(options);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const auto pieces = [&](Memory& memory, int) { return DppMemory<T>(memory, N, k); };
  for_each_image(B, dpp_work(N, k), pieces, [&](int64_t b, const auto& memory, Crew& crew) {
    dpp_select_image<T>(matrices.at<T>(b), matrices.ld, arguments.from(b * N), N, k, crew, memory,
                        output<int64_t>(order) + b * k);
  });
  return order;
}

Tensor dpp_select(const Tensor& s, std::optional<Tensor> quality, int64_t k, std::optional<Tensor> tier,
                  std::optional<Tensor> candidates, double eps, double damping) {
  check_rank("s", s, "B N N", 3);
  check_shape("s", s, "B N N", {s.size(0), s.size(1), s.size(1)});
  check_working("s", s);
  check_num_tokens("s", s);
  const DppOptions options{quality, tier, candidates, eps, damping};
  options.check("B N", {s.size(0), s.size(1)});
  check_count("k", k, s.size(1));
  return options.is_wide(s) ? dpp_select_as<double>(s, k, options) : dpp_select_as<float>(s, k, options);
}

constexpr int64_t kStoredKeys = 1024;  // tokens: 4 MB of similarities; above, rows are computed as they are needed

template <class T>
struct FromKeysMemory {
  FromKeysMemory(Memory& memory, int64_t n, int64_t k, int slots)
      : similarity(memory, n, slots, n <= kStoredKeys),
        tier(memory.take<int8_t>(n)),
        s(memory.take<T>(n <= kStoredKeys ? n * n : 0)),
        square(memory.take<T>(n <= kStoredKeys ? 0 : kDppPool * kDppPool)),
        rows(memory.take<T>(n <= kStoredKeys ? 0 : kDppPool + kTile, width_of(n))),
        dpp(memory, n, k) {}
  SimilarityMemory<T> similarity;
  int8_t* tier;
  T *s, *square, *rows;
  DppMemory<T> dpp;
};

template <class T>
Tensor dpp_select_from_keys_as(const Tensor& keys, int64_t k, const DppOptions& options) {
  const int64_t B = keys.size(0), N = keys.size(1);
  const DppArguments<T> arguments(options);
  const Tensor order = empty("order", {B, k}, ScalarType::Long);
  const double rows = static_cast<double>(N <= kStoredKeys ? N / 2 : k);
  const double work = dpp_work(N, k) + products(rows * static_cast<double>(N) * static_cast<double>(keys.size(2)));
  const auto pieces = [&](Memory& memory, int slots) { return FromKeysMemory<T>(memory, N, k, slots); };
  for_each_image(B, work, pieces, [&](int64_t b, auto& memory, Crew& crew) {
    const Rows image = rows_of(keys, b);
    const Dpp<T> dpp = arguments.from(b * N);
    int64_t* picks = output<int64_t>(order) + b * k;
    measure_keys<T>(image, nullptr, nullptr, crew, memory.similarity, memory.tier);
    if (N <= kStoredKeys) {
      similarity_among(image, nullptr, N, crew, memory.similarity, memory.s);
      select(StoredRows<T>{memory.s, N}, dpp, N, k, crew, memory.dpp, picks);
    } else {
      select(KeyRows<T>{image, crew, memory.similarity, memory.square, memory.rows}, dpp, N, k, crew, memory.dpp,
             picks);
    }
  });
  return order;
}

Tensor dpp_select_from_keys(const Tensor& keys, std::optional<Tensor> quality, int64_t k, std::optional<Tensor> tier,
                            std::optional<Tensor> candidates, double eps, double damping) {
  check_rank("keys", keys, "B N Dk", 3);
  check_floating("keys", keys);
  check_not_empty("keys", keys, 1, "token");
  check_num_tokens("keys", keys);
  check_not_empty("keys", keys, 2, "channel");
  const DppOptions options{quality, tier, candidates, eps, damping};
  options.check("B N", {keys.size(0), keys.size(1)});
  check_count("k", k, keys.size(1));
  return options.is_wide(keys) ? dpp_select_from_keys_as<double>(keys, k, options)
                               : dpp_select_from_keys_as<float>(keys, k, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("dpp_select", TORCH_BOX(&dpp_select));
  m.impl("dpp_select_from_keys", TORCH_BOX(&dpp_select_from_keys));
}

}  // namespace condense
