// The flagship: the stages in a row. s lives only while its image does, at most one a thread; of a long image only the
// kept tokens' rows are ever stored.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "stages.h"
#include "tensors.h"

namespace condense {
namespace {

// Tokens up to which an image's s is stored: 64 MB in fp32.
int64_t stored_tokens() {
  static const int64_t tokens = [] {
    constexpr int64_t kTokens = 4096;
    const char* asked = std::getenv("CONDENSE_STORED_TOKENS");
    if (!asked) return kTokens;
    char* end;
    const int64_t number = std::strtoll(asked, &end, 10);
    if (end != asked && *end == 0 && number >= 0) return number;
    std::fprintf(stderr, "CONDENSE_STORED_TOKENS: expected a number of tokens, got %s; it is ignored.\n", asked);
    return kTokens;
  }();
  return tokens;
}

// The operator's arguments, checked.
struct Arguments {
  const Tensor &features, &scores, &keys;
  const std::optional<Tensor>& mask;
  int64_t num_anchors, num_background;
  double suppression;
  Space space;
  Schedule schedule;  // decided once: the number of threads may change while a call is under way

  int64_t B() const { return features.size(0); }
  int64_t N() const { return features.size(1); }
  int64_t D() const { return features.size(2); }
  int64_t K() const { return num_anchors + num_background; }
  bool stored() const { return N() <= stored_tokens(); }
};

struct Outputs {
  Tensor merged, indices, assignment, mass;
};

template <class T>
struct Kept {
  int64_t token;
  const T* s_row;
};

// What one image needs; S: the working type of the similarities, M: that of the merge.
template <class S, class M>
struct ImageMemory {
  ImageMemory(Memory& memory, const Arguments& a, int slots)
      : scores(memory.take<S>(a.N())),
        weights(weights_beside(scores, memory, a.N())),
        mask(memory.take<uint8_t>(a.mask ? a.N() : 0)),
        tier(memory.take<int8_t>(a.N())),
        rest(memory.take<int8_t>(a.N())),
        g(memory.take<S>(a.N())),
        order(memory.take<int64_t>(a.K())),
        kept(memory.take<Kept<S>>(a.K())),
        s(memory.take<S>(a.stored() ? a.N() * a.N() : 0)),
        rows(memory.take<S>(a.stored() ? 0 : (a.K() + kTile) * width_of(a.N()))),
        greedy(memory, a.stored() ? a.N() : 0),
        streamed_greedy(memory, a.stored() ? 0 : a.N()),
        where(memory, a.space, a.N()),
        assign(memory, a.N(), a.K()),
        kept_to_the_end(memory.at()),
        similarity(memory, a.N(), slots, a.stored()),
        merge(memory.rewound(kept_to_the_end), a.N(), a.D(), a.K(), slots) {}
  // The scores as the merge wants them.
  static M* weights_beside(S* scores, Memory& memory, int64_t n) {
    if constexpr (sizeof(S) == sizeof(M))
      return scores;
    else
      return memory.take<M>(n);
  }
  S* scores;
  M* weights;
  uint8_t* mask;
  int8_t *tier, *rest;
  S* g;
  int64_t* order;
  Kept<S>* kept;
  S *s, *rows;  // [N, N] where it is stored, else [K, width_of(N)] and room for a tile
  GreedyMemory<S> greedy;
  StreamedGreedyMemory<S> streamed_greedy;
  SpaceMemory<S> where;
  AssignMemory<S> assign;
  int64_t kept_to_the_end;
  SimilarityMemory<S> similarity;
  MergeMemory<M> merge;  // in the place of similarity
};

// The kept tokens, ascending: anchors by score (Eq. 2), then background by global similarity (Eq. 4).
template <class S, class M>
void select_image(const Rows& keys, const Arguments& a, S sbar, Crew& crew, ImageMemory<S, M>& memory) {
  const int64_t N = a.N(), width = width_of(N);
  const auto suppression = static_cast<S>(a.suppression);
  const auto select_stored = [&](const S* prior, const int8_t* tier, int64_t first, int64_t k) {
    int64_t* order = memory.order + first;
    greedy_select_image<S>(memory.s, N, prior, &sbar, tier, N, k, suppression, memory.greedy, order);
    for (int64_t i = 0; i < k; ++i) memory.kept[first + i] = {order[i], memory.s + order[i] * N};
  };
  const auto select_streamed = [&](const S* prior, const int8_t* tier, int64_t first, int64_t k) {
    int64_t* order = memory.order + first;
    S* rows = memory.rows + first * width;
    const int64_t picks = greedy_select_streamed<S>(keys, prior, &sbar, tier, k, suppression, crew, memory.similarity,
                                                    memory.streamed_greedy, order, rows);
    std::fill(rows + picks * width, rows + k * width, S{0});  // of tokens that are not valid
    for (int64_t i = 0; i < k; ++i) memory.kept[first + i] = {order[i], rows + i * width};
  };
  const auto select = [&](const S* prior, const int8_t* tier, int64_t first, int64_t k) {
    return a.stored() ? select_stored(prior, tier, first, k) : select_streamed(prior, tier, first, k);
  };
  select(memory.scores, memory.tier, 0, a.num_anchors);
  std::copy(memory.tier, memory.tier + N, memory.rest);
  for (int64_t i = 0; i < a.num_anchors; ++i) memory.rest[memory.order[i]] = kTaken;  // no candidate for the background
  select(memory.g, memory.rest, a.num_anchors, a.num_background);
  std::sort(memory.kept, memory.kept + a.K(), [](const Kept<S>& x, const Kept<S>& y) { return x.token < y.token; });
}

template <class S, class M>
void condense_image(const Arguments& a, int64_t b, Crew& crew, ImageMemory<S, M>& memory, const Outputs& out) {
  const int64_t N = a.N(), D = a.D(), K = a.K();
  const Rows keys = rows_of(a.keys, b), features = rows_of(a.features, b);
  int64_t *indices = output<int64_t>(out.indices) + b * K, *assignment = output<int64_t>(out.assignment) + b * N;
  convert_row(a.scores, b, memory.scores);
  if constexpr (sizeof(S) != sizeof(M)) convert_row(a.scores, b, memory.weights);
  if (a.mask) convert_row(*a.mask, b, memory.mask);
  S sbar = 0;
  similarity_image<S>(keys, memory.scores, a.mask ? memory.mask : nullptr, crew, memory.similarity, memory.s, &sbar,
                      memory.g, memory.tier);
  select_image(keys, a, sbar, crew, memory);
  for (int64_t row = 0; row < K; ++row) {
    indices[row] = memory.kept[row].token;
    memory.assign.s_rows[row] = memory.kept[row].s_row;
  }
  memory.where.fill(a.space, b, N, memory.tier);
  assign_image<S>(indices, memory.tier, memory.where.layout, N, K, crew, memory.assign, assignment);
  merge_image<M>(features, memory.weights, indices, assignment, K, crew, memory.merge,
                 output<char>(out.merged) + b * K * D * features.element_size(), output<M>(out.mass) + b * K);
}

// Bytes of one image in flight.
template <class S, class M>
int64_t image_bytes(const Arguments& a) {
  Memory count;
  ImageMemory<S, M>(count, a, a.schedule.slots);
  return count.taken();
}

template <class S, class M>
void condense_images(const Arguments& a, const Outputs& out, const Workspace& workspace, int64_t bytes) {
  for_each_image(a.B(), a.schedule, workspace, bytes, [&](int64_t b, Memory piece, Crew& crew) {
    ImageMemory<S, M> memory(piece, a, a.schedule.slots);
    condense_image(a, b, crew, memory, out);
  });
}

bool is_wide_merge(const Arguments& a) { return is_double(a.scores) || is_double(a.features); }

// A call, for the working types of its arguments.
struct Call {
  const Arguments& a;
  int64_t image_bytes;
  void (*condense_images)(const Arguments&, const Outputs&, const Workspace&, int64_t);

  int64_t bytes() const { return a.schedule.at_a_time * image_bytes; }
  void run(const Outputs& out, const Workspace& workspace) const { condense_images(a, out, workspace, image_bytes); }
};

template <class S, class M>
Call call_as(const Arguments& a) {
  return {a, image_bytes<S, M>(a), condense_images<S, M>};
}

Call call_of(const Arguments& a) {
  const bool wide_s = is_double(a.scores) || is_double(a.keys), wide_m = is_wide_merge(a);
  return wide_s ? (wide_m ? call_as<double, double>(a) : call_as<double, float>(a))
                : (wide_m ? call_as<float, double>(a) : call_as<float, float>(a));
}

Arguments checked(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                  const std::optional<Tensor>& keys, const std::optional<std::vector<int64_t>>& grid,
                  const std::optional<Tensor>& positions, const std::optional<Tensor>& mask, double suppression,
                  double spatial_weight) {
  check_rank("features", features, "B N D", 3);
  check_floating("features", features);
  check_not_empty("features", features, 1, "token");
  check_not_empty("features", features, 2, "channel");
  check_num_tokens("features", features);
  const int64_t B = features.size(0), N = features.size(1);
  check_shape("scores", scores, "B N", {B, N});
  check_floating("scores", scores);
  check_budget(num_anchors, num_background, N);
  if (keys) {
    check_rank("keys", *keys, "B N Dk", 3);
    check_shape("keys", *keys, "B N Dk", {B, N, keys->size(2)});
    check_floating("keys", *keys);
    check_not_empty("keys", *keys, 2, "channel");
  }
  if (mask) {
    check_shape("mask", *mask, "B N", {B, N});
    check_dtype("mask", *mask, {ScalarType::Bool}, "bool");
  }
  check_weight("suppression", suppression);
  check_weight("spatial_weight", spatial_weight);
  check_where(grid, positions, spatial_weight, B, N);
  const Tensor& k = keys ? *keys : features;
  const Schedule schedule(B, static_cast<double>(N) * N * k.size(2));
  return {features, scores, k, mask, num_anchors, num_background, suppression, {grid, positions, spatial_weight},
          schedule};
}

void check_output(const char* name, const Tensor& t, const char* axes, const std::vector<int64_t>& sizes,
                  ScalarType dtype) {
  check_shape(name, t, axes, sizes);
  check_dtype(name, t, {dtype}, dtype_name(dtype).c_str());
  if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor to write into, got another layout.");
}

// Starts on a cache line, wherever the caller's bytes do.
Workspace workspace_in(const Tensor& bytes, int64_t needed) {
  check_rank("workspace", bytes, "bytes", 1);
  check_dtype("workspace", bytes, {ScalarType::Byte}, "uint8");
  if (!bytes.is_contiguous()) fail("workspace: expected a contiguous tensor, got strides [", bytes.stride(0), "].");
  if (bytes.numel() < needed + Memory::kLine) {
    fail("workspace: expected at least ", needed + Memory::kLine, " bytes, got ", bytes.numel(),
         ". Remedy: ask workspace_bytes of these arguments; it depends on the number of threads.");
  }
  const auto address = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
  const auto start = (address + Memory::kLine - 1) / Memory::kLine * Memory::kLine;
  return {reinterpret_cast<void*>(start), needed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_and_merge(const Tensor& features, const Tensor& scores,
                                                            int64_t num_anchors, int64_t num_background,
                                                            std::optional<Tensor> keys,
                                                            std::optional<std::vector<int64_t>> grid,
                                                            std::optional<Tensor> positions, std::optional<Tensor> mask,
                                                            double suppression, double spatial_weight) {
  const Arguments a =
      checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression, spatial_weight);
  const Outputs out{torch::stable::empty({a.B(), a.K(), a.D()}, features.scalar_type()),
                    torch::stable::empty({a.B(), a.K()}, ScalarType::Long),
                    torch::stable::empty({a.B(), a.N()}, ScalarType::Long),
                    torch::stable::empty({a.B(), a.K()}, is_wide_merge(a) ? ScalarType::Double : ScalarType::Float)};
  const Call call = call_of(a);
  call.run(out, Workspace(call.bytes()));
  return {out.merged, out.indices, out.assignment, out.mass};
}

void select_and_merge_out(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                          std::optional<Tensor> keys, std::optional<std::vector<int64_t>> grid,
                          std::optional<Tensor> positions, std::optional<Tensor> mask, double suppression,
                          double spatial_weight, std::optional<Tensor> workspace, const Tensor& merged,
                          const Tensor& indices, const Tensor& assignment, const Tensor& mass) {
  const Arguments a =
      checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression, spatial_weight);
  check_output("merged", merged, "B K D", {a.B(), a.K(), a.D()}, features.scalar_type());
  check_output("indices", indices, "B K", {a.B(), a.K()}, ScalarType::Long);
  check_output("assignment", assignment, "B N", {a.B(), a.N()}, ScalarType::Long);
  check_output("mass", mass, "B K", {a.B(), a.K()}, is_wide_merge(a) ? ScalarType::Double : ScalarType::Float);
  const Outputs out{merged, indices, assignment, mass};
  const Call call = call_of(a);
  if (workspace) {
    call.run(out, workspace_in(*workspace, call.bytes()));
  } else {
    call.run(out, Workspace(call.bytes()));
  }
}

int64_t workspace_bytes(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                        std::optional<Tensor> keys, std::optional<std::vector<int64_t>> grid,
                        std::optional<Tensor> positions, std::optional<Tensor> mask, double suppression,
                        double spatial_weight) {
  const Arguments a =
      checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression, spatial_weight);
  return Memory::kLine + call_of(a).bytes();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("select_and_merge", TORCH_BOX(&select_and_merge));
  m.impl("select_and_merge_out", TORCH_BOX(&select_and_merge_out));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
}

}  // namespace condense
