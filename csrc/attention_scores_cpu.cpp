// The attention that each key gets, averaged over query rows (Eq. 1), without the map of all of it.
//
// A strip of kTile rows is multiplied with all keys, becomes probabilities where it lies, and is added up by columns:
// a thread holds one strip. Strips are added in their order, so the sum does not depend on who computed them. Masked
// keys are not packed: an image has the bits that it has without its padding.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "attention_scores.h"
#include "checks.h"

namespace condense {
namespace {

constexpr int64_t panels_of(int64_t n) { return width_of(n) / kTile; }

// The channels as they are multiplied: in chunks of kChunk numbers, or of so many pairs.
struct Depth {
  Depth(int64_t d, bool in_pairs) : d(d), most(in_pairs ? 2 * kChunk : kChunk), in_pairs(in_pairs) {}
  int64_t chunks() const { return (d + most - 1) / most; }
  int64_t channels(int64_t chunk) const { return std::min(most, d - chunk * most); }
  int64_t words(int64_t chunk) const { return in_pairs ? (channels(chunk) + 1) / 2 : channels(chunk); }
  int64_t padded(int64_t chunk) const { return (words(chunk) + kStep - 1) / kStep * kStep; }
  int64_t panel_size() const { return in_pairs ? row_ops<float>().pairs_panel : padded(0) * kTile; }

  int64_t d, most;
  bool in_pairs;
};

template <class T>
struct Attention {
  const HeadGroup<T>& group;
  const AttentionMemory<T>& memory;
  const RowOps<T>& ops = row_ops<T>();
  const Depth depth;
  int64_t num_keys, num_rows;

  Attention(const HeadGroup<T>& group, const AttentionMemory<T>& memory)
      : group(group), memory(memory), depth(group.keys.d, multiplies_in_pairs(group.keys)) {
    list_keys();
    list_rows();
  }

  void list_keys() {
    num_keys = 0;
    for (int64_t i = 0; i < group.keys.n; ++i) {
      memory.before[i] = num_keys;
      if (!group.mask || group.mask[i] != 0) memory.keys[num_keys++] = i;
    }
    memory.before[group.keys.n] = num_keys;
  }

  void list_rows() {
    num_rows = 0;
    for (int64_t r = 0; r < group.num_rows; ++r) {
      const int64_t row = group.rows ? group.rows[r] : r;
      if (row >= 0) memory.rows[num_rows++] = row;
    }
  }

  T* panel(int64_t chunk, int64_t j) const {
    return memory.panels + (chunk * panels_of(num_keys) + j) * depth.panel_size();
  }

  // Up to kTile rows of one chunk of channels, which `which` lists.
  void pack(const Rows& from, const int64_t* which, int64_t count, int64_t chunk, T* rows, T* packed) const {
    const int64_t words = depth.words(chunk), padded = depth.padded(chunk);
    const auto load = depth.in_pairs ? ops.load_pairs : nullptr;
    for (int64_t r = 0; r < kTile; ++r) {
      T* row = rows + r % kStep * kChunk;
      const int64_t filled = r < count ? words : 0;
      if (filled > 0) {
        const void* at = from.at(which[r], chunk * depth.most);
        if (load) {
          load(at, from.stride_d, depth.channels(chunk), T{1}, row);
        } else {
          ops.load_row(at, from.dtype, from.stride_d, depth.channels(chunk), T{1}, row);
        }
      }
      std::fill(row + filled, row + padded, T{0});
      if (r % kStep == kStep - 1)
        (depth.in_pairs ? ops.pack_pairs : ops.pack_rows)(rows, r + 1 - kStep, padded, packed);
    }
  }

  void pack_keys(const Share& share, const StripMemory<T>& mine) const {
    for (int64_t j = share.lo; j < share.hi; ++j) {
      const int64_t first = j * kTile, count = std::min<int64_t>(kTile, num_keys - first);
      for (int64_t c = 0; c < depth.chunks(); ++c) {
        pack(group.keys, memory.keys + first, count, c, mine.rows, panel(c, j));
      }
    }
  }

  // How many of the listed keys, from the first on, a query sees.
  int64_t seen_by(int64_t row) const {
    if (!group.causal) return num_keys;
    return memory.before[std::clamp<int64_t>(row + group.keys.n - group.queries.n + 1, 0, group.keys.n)];
  }

  // x [0, seen) become probabilities, up to the weight that is returned; zeros from there to `end`.
  T normalise(T* x, int64_t seen, int64_t end, const T* lse) const {
    if (seen == 0 || (lse && std::isinf(*lse))) {
      std::fill(x, x + end, T{0});
      return 0;
    }
    const T shift = lse ? *lse : ops.max_row(x, seen) * group.scale;
    const double sum = ops.exp_row(x, seen, end, group.scale, shift);
    if (lse) return 1;
    if (std::isfinite(sum)) return static_cast<T>(1 / sum);
    std::fill(x, x + seen, std::numeric_limits<T>::quiet_NaN());  // what is not seen stays 0
    return 1;
  }

  // Up to kTile rows of a head: the sums of their probabilities. Returns how many keys at most they see.
  int64_t strip(int64_t head, int64_t first, const StripMemory<T>& mine) const {
    const int64_t count = std::min<int64_t>(kTile, num_rows - first), width = width_of(num_keys);
    const int64_t* rows = memory.rows + first;
    const Rows queries = group.queries_of(head);
    for (int64_t c = 0; c < depth.chunks(); ++c) {
      pack(queries, rows, count, c, mine.rows, mine.queries + c * depth.panel_size());
    }
    int64_t most = 0;
    for (int64_t r = 0; r < count; ++r) most = std::max(most, seen_by(rows[r]));
    const auto multiply = depth.in_pairs ? ops.multiply_pairs : ops.multiply_tile;
    for (int64_t j = 0; j < panels_of(most); ++j) {
      for (int64_t c = 0; c < depth.chunks(); ++c) {
        multiply(mine.queries + c * depth.panel_size(), panel(c, j), depth.words(c), count, mine.strip + j * kTile,
                 width, c > 0);
      }
    }
    const int64_t end = width_of(most);
    for (int64_t r = 0; r < count; ++r) {
      const T* lse = group.lse ? group.lse + head * group.ld_lse + rows[r] : nullptr;
      mine.weights[r] = normalise(mine.strip + r * width, seen_by(rows[r]), end, lse);
    }
    ops.sum_columns(mine.strip, width, count, mine.weights, end, mine.sums);
    return most;
  }

  void run(int64_t head, Crew& crew) const {
    std::fill(memory.totals, memory.totals + num_keys, 0.0);
    std::vector<int64_t> most(crew.size());
    for (int64_t first = 0; first < num_rows; first += crew.size() * kTile) {
      crew.run([&](int slot) {
        const int64_t mine = first + slot * kTile;
        most[slot] = mine < num_rows ? strip(head, mine, memory.of_slot[slot]) : 0;
      });
      for (int slot = 0; slot < crew.size(); ++slot) {
        for (int64_t i = 0; i < most[slot]; ++i) memory.totals[i] += memory.of_slot[slot].sums[i];
      }
    }
    T* scores = group.scores + head * group.ld_scores;
    std::fill(scores, scores + group.keys.n, T{0});
    for (int64_t i = 0; i < num_keys && num_rows > 0; ++i) {
      scores[memory.keys[i]] = static_cast<T>(memory.totals[i] / static_cast<double>(num_rows));
    }
  }
};

}  // namespace

template <class T>
AttentionMemory<T>::AttentionMemory(Memory& memory, int64_t n, int64_t num_rows, int64_t d, bool in_pairs, int slots)
    : panels(memory.take<T>(panels_of(n) * Depth(d, in_pairs).panel_size(), Depth(d, in_pairs).chunks())),
      keys(memory.take<int64_t>(n)),
      rows(memory.take<int64_t>(num_rows)),
      before(memory.take<int64_t>(n + 1)),
      totals(memory.take<double>(n)),
      of_slot(memory.take<StripMemory<T>>(slots)) {
  const Depth depth(d, in_pairs);
  for (int slot = 0; slot < slots; ++slot) {
    const StripMemory<T> of_this{memory.take<T>(kTile * kChunk), memory.take<T>(depth.panel_size(), depth.chunks()),
                                 memory.take<T>(width_of(n), kTile), memory.take<T>(kTile),
                                 memory.take<T>(width_of(n))};
    if (of_slot) new (of_slot + slot) StripMemory<T>(of_this);
  }
}

Rows rows_of_head(const Tensor& t, int64_t offset, int64_t n, int64_t stride_n) {
  const int64_t channel = t.dim() - 1;
  Rows rows{static_cast<const char*>(t.const_data_ptr()), dtype_of(t), n, t.size(channel), stride_n, t.stride(channel)};
  rows.data += offset * rows.element_size();
  return rows;
}

bool multiplies_in_pairs(const Rows& keys) { return keys.dtype == Dtype::kBFloat16 && row_ops<float>().multiply_pairs; }

template <class T>
void attention_scores_of(const HeadGroup<T>& group, Crew& crew, const AttentionMemory<T>& memory) {
  const Attention<T> attention(group, memory);
  crew.run([&](int slot) {
    attention.pack_keys(Share(panels_of(attention.num_keys), slot, crew.size()), memory.of_slot[slot]);
  });
  for (int64_t head = 0; head < group.heads; ++head) attention.run(head, crew);
}

template struct AttentionMemory<float>;
template struct AttentionMemory<double>;
template void attention_scores_of<float>(const HeadGroup<float>&, Crew&, const AttentionMemory<float>&);
template void attention_scores_of<double>(const HeadGroup<double>&, Crew&, const AttentionMemory<double>&);

double scale_of(const std::optional<double>& scale, int64_t d) {
  if (!scale) return 1 / std::sqrt(static_cast<double>(d));
  check_weight("scale", *scale);
  return *scale;
}

void check_heads(const Tensor& queries, const Tensor& keys, const char* axes, const char* axes_of_keys, int64_t rank) {
  check_rank("queries", queries, axes, rank);
  check_floating("queries", queries);
  check_not_empty("queries", queries, rank - 1, "channel");
  check_not_empty("queries", queries, 1, "head");
  check_rank("keys", keys, axes_of_keys, rank);
  check_dtype("keys", keys, {queries.scalar_type()}, dtype_name(queries.scalar_type()).c_str());
  check_not_empty("keys", keys, 1, "head");
  if (queries.size(1) % keys.size(1) != 0) {
    fail("keys: expected a number of heads that divides the Hq = ", queries.size(1), " of queries, got ", keys.size(1),
         ". Remedy: each key head serves Hq / Hkv neighbouring query heads.");
  }
}

namespace {

// Head h of image b of [B, H, N, d].
Rows head_of(const Tensor& t, int64_t b, int64_t h) {
  return rows_of_head(t, b * t.stride(0) + h * t.stride(1), t.size(2), t.stride(2));
}

template <class T>
Tensor attention_scores_as(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& rows,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& lse, double scale,
                           bool causal) {
  const int64_t B = queries.size(0), heads = queries.size(1), M = queries.size(2), d = queries.size(3);
  const int64_t key_heads = keys.size(1), N = keys.size(2), shared = heads / key_heads;
  const Tensor scores = empty("scores", {B, heads, N}, kScalarType<T>);
  const auto valid = contiguous_as("mask", mask, ScalarType::Bool);
  const auto outside = contiguous_as("lse", lse, kScalarType<T>);
  const auto listed = contiguous_as("rows", rows, ScalarType::Long);
  const int64_t num_rows = listed ? listed->size(listed->dim() - 1) : M;
  if (listed) check_values("rows", data_of<int64_t>(*listed), listed->numel(), -1, M);
  const auto group_of = [&](int64_t b, int64_t key_head) {
    const int64_t head = b * heads + key_head * shared;
    return HeadGroup<T>{head_of(keys, b, key_head),
                        head_of(queries, b, key_head * shared),
                        shared,
                        queries.stride(1),
                        outside ? data_of<T>(*outside) + head * M : nullptr,
                        M,
                        row_of<uint8_t>(valid, b, N),
                        row_of<int64_t>(listed, listed && listed->dim() == 2 ? b : 0, num_rows),
                        num_rows,
                        static_cast<T>(scale),
                        causal,
                        output<T>(scores) + head * N,
                        N};
  };
  if (B == 0) return scores;
  const HeadGroup<T> first = group_of(0, 0);
  const auto pieces = [&](Memory& memory, int slots) {
    return AttentionMemory<T>(memory, N, num_rows, d, multiplies_in_pairs(first.keys), slots);
  };
  for_each_image(B * key_heads, first.work(), pieces, [&](int64_t i, auto& memory, Crew& crew) {
    attention_scores_of(group_of(i / key_heads, i % key_heads), crew, memory);
  });
  return scores;
}

Tensor attention_scores(const Tensor& queries, const Tensor& keys, std::optional<Tensor> rows,
                        std::optional<Tensor> mask, std::optional<Tensor> lse, std::optional<double> scale,
                        bool causal) {
  check_heads(queries, keys, "B Hq M d", "B Hkv N d", 4);
  const int64_t B = queries.size(0), M = queries.size(2);
  check_shape("keys", keys, "B Hkv N d", {B, keys.size(1), keys.size(2), queries.size(3)});
  if (rows) {
    if (rows->dim() == 2) {
      check_shape("rows", *rows, "B R", {B, rows->size(1)});
    } else {
      check_rank("rows", *rows, "R", 1);
    }
    check_dtype("rows", *rows, {ScalarType::Long}, "int64");
  }
  if (mask) {
    check_shape("mask", *mask, "B N", {B, keys.size(2)});
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  if (lse) {
    check_shape("lse", *lse, "B Hq M", {B, queries.size(1), M});
    check_working("lse", *lse);
  }
  const auto run = is_double(queries) ? attention_scores_as<double> : attention_scores_as<float>;
  return run(queries, keys, rows, mask, lse, scale_of(scale, queries.size(3)), causal);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("attention_scores", TORCH_BOX(&attention_scores)); }

}  // namespace condense
