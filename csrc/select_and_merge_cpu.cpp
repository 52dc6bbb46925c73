// The flagship: the stages in a row. s lives only while its image does, at most one a thread; of a long image only the
// kept tokens' rows are ever stored.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "gathered.h"
#include "select_and_merge.h"
#include "storing.h"

namespace condense {
namespace {

// How an image's tokens are picked; the picks are the same either way. Costs are in products of two keys.
struct Plan {
  explicit Plan(const Image& image)
      : n(static_cast<double>(image.N())),
        storing(Storing::of(image.keys, image.K(), image.similarity_bytes())),
        may_store(storing.is_allowed()),
        needs_all(!image.mean_similarity),
        stores(needs_all ? storing.is_chosen(kRoundsOfAll)
                         : may_store && lazy_cost(image, kExpectedRounds) > 0.9 * stored_cost()) {}

  double stored_cost() const { return 0.5 * n * n; }
  static int64_t pool_of(int64_t n, int64_t k) { return std::min({n, kPool, width_of(k)}); }
  // A pass over the packed keys takes as long as 8 rows do, packing a key as 16 products.
  double round_cost(int64_t k) const {
    const auto pool = static_cast<double>(pool_of(static_cast<int64_t>(n), k));
    return 8 * n + (0.5 * pool + 16) * pool;
  }
  double loop_cost(int64_t k, double rounds) const {
    return k > 0 ? n * static_cast<double>(k) + rounds * round_cost(k) : 0;
  }
  double lazy_cost(const Image& image, double rounds) const {
    return 16 * n + loop_cost(image.num_anchors, rounds) + loop_cost(image.num_background, rounds);
  }
  // Tokens in many copies may end a round with every pick. Once the rounds of a loop have cost as much as s, it is s
  // that is computed after all.
  Rounds rounds(int64_t k) const {
    Rounds found;
    if (!needs_all && may_store) found.most = static_cast<int64_t>(stored_cost() / round_cost(k));
    return found;
  }

  static constexpr double kExpectedRounds = 3;
  static constexpr double kRoundsOfAll = 12;  // of both loops, with the rows of their first picks: 8 to 15 were seen
  double n;
  Storing storing;
  bool may_store, needs_all, stores;
};

bool has_keys_of_its_own(const Image& image) {
  const Rows &x = image.features, &y = image.keys;
  return x.data != y.data || x.stride_n != y.stride_n || x.stride_d != y.stride_d || x.d != y.d || x.dtype != y.dtype;
}

template <class T>
struct Kept {
  int64_t token;
  const T* s_row;
};

// What one image needs; S: the working type of the similarities, M: that of the merge.
template <class S, class M>
struct ImageMemory {
  ImageMemory(Memory& memory, const Image& image, int slots)
      : ImageMemory(memory, image, slots, image.N(), image.K(), Plan(image)) {}
  ImageMemory(Memory& memory, const Image& image, int slots, int64_t n, int64_t k, const Plan& plan)
      : scores(memory.take<S>(n)),
        weights(weights_beside(scores, memory, n)),
        mask(memory.take<uint8_t>(image.mask ? n : 0)),
        tier(memory.take<int8_t>(n)),
        rest(memory.take<int8_t>(n)),
        g(memory.take<S>(n)),
        order(memory.take<int64_t>(k)),
        kept(memory.take<Kept<S>>(k)),
        s(memory.take<S>(plan.stores ? n * n : 0)),
        rows(memory.take<S>(plan.stores ? 0 : (k + kTile) * width_of(n))),
        greedy(memory, plan.stores ? n : 0),
        streamed_greedy(memory, plan.stores ? 0 : n, pool_of(n, std::max(image.num_anchors, image.num_background))),
        where(memory, image.space, n),
        assign(memory, n, k),
        features(memory, image.features, n),
        keys(memory, image.keys, has_keys_of_its_own(image) ? n : 0),
        kept_to_the_end(memory.at()),
        similarity(memory, n, slots, !plan.needs_all || plan.stores, Metric::kCosine, false,
                   plan.needs_all || plan.stores ? 0 : image.keys.d),
        sums(memory, plan.needs_all ? 0 : n, image.keys.d, slots),
        merge(memory.rewound(kept_to_the_end), n, image.D(), k, slots) {}
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
  Gathered features, keys;
  int64_t kept_to_the_end;
  SimilarityMemory<S> similarity;
  GlobalMemory<S> sums;
  MergeMemory<M> merge;  // in the place of the two
};

// All of s [N, N], once tokens are measured.
template <class S, class M>
void store_similarities(const Image& image, Crew& crew, ImageMemory<S, M>& memory) {
  similarity_among<S>(image.keys, nullptr, image.N(), crew, memory.similarity, memory.s);
}

// The kept tokens, ascending: anchors by score (Eq. 2), then background by global similarity (Eq. 4).
template <class S, class M>
void select_image(const Image& image, const Plan& plan, S sbar, Crew& crew, ImageMemory<S, M>& memory,
                  std::optional<Workspace>& rest) {
  const int64_t N = image.N(), num_anchors = image.num_anchors, width = width_of(N);
  bool is_stored = plan.stores;
  const auto select_stored = [&](const Selection<S>& selection, int64_t first, int64_t k) {
    int64_t* order = memory.order + first;
    const GreedyMemory<S>& greedy = plan.stores ? memory.greedy : memory.streamed_greedy.all;
    greedy_select_image<S>(memory.s, N, selection, false, N, k, crew, greedy, order);
    for (int64_t i = 0; i < k; ++i) memory.kept[first + i] = {order[i], memory.s + order[i] * N};
  };
  const auto select_streamed = [&](const Selection<S>& selection, int64_t first, int64_t k) {
    int64_t* order = memory.order + first;
    S* rows = memory.rows + first * width;
    StreamedGreedyMemory<S> greedy = memory.streamed_greedy;
    if (!plan.needs_all) greedy.most = Plan::pool_of(N, k);
    const int64_t picks = greedy_select_streamed<S>(image.keys, selection, k, crew, memory.similarity, greedy, order,
                                                    rows, plan.rounds(k));
    const auto is_out = [](S nu) { return std::isnan(nu); };
    is_stored = picks < k && !std::all_of(greedy.all.nu, greedy.all.nu + N, is_out);  // from here on
    if (is_stored) {
      Memory count;
      count.take<S>(N, N);
      rest.emplace(count.taken());
      memory.s = rest->piece(0, count.taken()).template take<S>(N, N);
      store_similarities(image, crew, memory);
      greedy_select_resumed<S>(memory.s, N, selection, N, picks, k, greedy.all, order);
    } else {
      std::fill(rows + picks * width, rows + k * width, S{0});  // of tokens that are not valid
    }
    for (int64_t i = 0; i < k; ++i) {
      memory.kept[first + i] = {order[i], is_stored && i >= picks ? memory.s + order[i] * N : rows + i * width};
    }
  };
  const auto select = [&](const S* prior, const int8_t* tier, double factor, int64_t first, int64_t k) {
    Selection<S> selection;
    selection.prior = prior;
    selection.sbar = image.scale_prior ? &sbar : nullptr;
    selection.tier = tier;
    selection.suppression = static_cast<S>(factor);
    return is_stored ? select_stored(selection, first, k) : select_streamed(selection, first, k);
  };
  select(memory.scores, memory.tier, image.suppression, 0, num_anchors);
  std::copy(memory.tier, memory.tier + N, memory.rest);
  for (int64_t i = 0; i < num_anchors; ++i) memory.rest[memory.order[i]] = kTaken;  // no candidate for the background
  select(memory.g, memory.rest, image.background_suppression, num_anchors, image.num_background);
  std::sort(memory.kept, memory.kept + image.K(), [](const Kept<S>& x, const Kept<S>& y) { return x.token < y.token; });
}

// What the picks need beside s: tier, sbar, g; and s where it is stored.
template <class S, class M>
S measure_image(const Image& image, const Plan& plan, Crew& crew, ImageMemory<S, M>& memory) {
  const uint8_t* mask = image.mask ? memory.mask : nullptr;
  if (plan.needs_all) {
    S sbar = 0;
    similarity_image<S>(image.keys, memory.scores, mask, crew, memory.similarity, memory.s, &sbar, memory.g,
                        memory.tier);
    return sbar;
  }
  global_similarity_image<S>(image.keys, memory.scores, mask, crew, memory.similarity.factors, memory.sums,
                             image.num_background > 0 ? memory.g : nullptr, memory.tier);
  plan.stores ? store_similarities(image, crew, memory) : pack_keys(image.keys, crew, memory.similarity);
  return static_cast<S>(*image.mean_similarity);
}

template <class S, class M>
void condense_image(const Image& given, const Results& out, Memory piece, Crew& crew) {
  const int64_t N = given.N(), K = given.K();
  ImageMemory<S, M> memory(piece, given, crew.size());
  Image image = given;
  image.features = memory.features.of(given.features, crew);
  image.keys = has_keys_of_its_own(given) ? memory.keys.of(given.keys, crew) : image.features;
  image.scores.read(N, memory.scores);
  if constexpr (sizeof(S) != sizeof(M)) image.scores.read(N, memory.weights);
  if (image.mask) image.mask.read(N, memory.mask);
  const Plan plan(image);
  const S sbar = measure_image(image, plan, crew, memory);
  std::optional<Workspace> rest;  // s, where rounds end after few picks
  select_image(image, plan, sbar, crew, memory, rest);
  for (int64_t row = 0; row < K; ++row) {
    out.indices[row] = memory.kept[row].token;
    memory.assign.s_rows[row] = memory.kept[row].s_row;
  }
  memory.where.fill(image.space, N, memory.tier);
  assign_image<S>(out.indices, memory.tier, memory.where.layout, N, K, crew, memory.assign, out.assignment);
  merge_image<M>(image.features, memory.weights, out.indices, out.assignment, K, crew, memory.merge, out.merged,
                 reinterpret_cast<M*>(out.mass));
}

template <class S, class M>
int64_t image_bytes(const Image& image, int slots) {
  Memory count;
  ImageMemory<S, M>(count, image, slots);
  return count.taken();
}

template <class S, class M>
Flagship flagship_as() {
  return {image_bytes<S, M>, condense_image<S, M>};
}

}  // namespace

// One pick comes after the other.
Work Image::work() const {
  const Plan plan(*this);
  const double pairs = plan.stores || plan.needs_all ? 2 * plan.stored_cost() : plan.lazy_cost(*this, 1);
  const auto tokens = static_cast<double>(N()), channels = static_cast<double>(keys.d);
  const double shared = products(pairs * channels) + tokens * (5 * channels + 300);
  return {shared + tokens * static_cast<double>(K() + 350), shared};
}

ScalarType mass_dtype(const Tensor& features, const Tensor& scores) {
  return is_double(features) || is_double(scores) ? ScalarType::Double : ScalarType::Float;
}

Flagship flagship_for(const Tensor& features, const Tensor& scores, const Tensor& keys) {
  const bool wide_s = is_double(scores) || is_double(keys);
  const bool wide_m = mass_dtype(features, scores) == ScalarType::Double;
  return wide_s ? (wide_m ? flagship_as<double, double>() : flagship_as<double, float>())
                : (wide_m ? flagship_as<float, double>() : flagship_as<float, float>());
}

namespace {

// The operator's arguments, checked.
struct Arguments {
  const Tensor &features, &scores, &keys;
  const std::optional<std::vector<int64_t>>& grid;
  const std::optional<Tensor>&positions, &mask, &mean_similarity;
  int64_t num_anchors, num_background;
  double suppression, spatial_weight, background_suppression;
  bool scale_prior;

  int64_t B() const { return features.size(0); }
  int64_t N() const { return features.size(1); }
  int64_t D() const { return features.size(2); }
  int64_t K() const { return num_anchors + num_background; }
  Image image(int64_t b) const {
    return {rows_of(features, b),
            rows_of(keys, b),
            column_of(scores, b),
            mask ? column_of(*mask, b) : Column{},
            space_of(grid, positions, spatial_weight, b),
            num_anchors,
            num_background,
            suppression,
            background_suppression,
            scale_prior,
            number_of(mean_similarity, b)};
  }
};

struct Outputs {
  Tensor merged, indices, assignment, mass;
};

// What a call decides before it starts: the number of threads may change while it is under way.
struct Call {
  explicit Call(const Arguments& a)
      : a(a),
        flagship(flagship_for(a.features, a.scores, a.keys)),
        first(a.image(0)),
        schedule(Schedule::for_batch(a.B(), first.work())),
        image_bytes(flagship.image_bytes(first, schedule.slots)) {}

  int64_t bytes() const { return schedule.at_a_time * image_bytes; }

  void run(const Outputs& out, const Workspace& workspace) const {
    const int64_t N = a.N(), K = a.K();
    const Results start{output<char>(out.merged), output<int64_t>(out.indices), output<int64_t>(out.assignment),
                        output<char>(out.mass)};
    const int64_t row_bytes = a.D() * out.merged.element_size(), mass_bytes = out.mass.element_size();
    for_each_image(a.B(), schedule, workspace, image_bytes, [&](int64_t b, Memory memory, Crew& crew) {
      const Results results{start.merged + b * K * row_bytes, start.indices + b * K, start.assignment + b * N,
                            start.mass + b * K * mass_bytes};
      flagship.condense_image(a.image(b), results, memory, crew);
    });
  }

  const Arguments& a;
  Flagship flagship;
  Image first;  // all are of its size
  Schedule schedule;
  int64_t image_bytes;
};

Arguments checked(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                  const std::optional<Tensor>& keys, const std::optional<std::vector<int64_t>>& grid,
                  const std::optional<Tensor>& positions, const std::optional<Tensor>& mask, double suppression,
                  double spatial_weight, std::optional<double> background_suppression, bool scale_prior,
                  const std::optional<Tensor>& mean_similarity) {
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
  check_weight("background_suppression", background_suppression);
  check_where(grid, positions, spatial_weight, B, N);
  if (mean_similarity) {
    check_shape("mean_similarity", *mean_similarity, "B", {B});
    check_working("mean_similarity", *mean_similarity);
  }
  return {features,       scores,      keys ? *keys : features, grid,
          positions,      mask,        mean_similarity,         num_anchors,
          num_background, suppression, spatial_weight,          background_suppression.value_or(suppression),
          scale_prior};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> select_and_merge(
    const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
    std::optional<Tensor> keys, std::optional<std::vector<int64_t>> grid, std::optional<Tensor> positions,
    std::optional<Tensor> mask, double suppression, double spatial_weight, std::optional<double> background_suppression,
    bool scale_prior, std::optional<Tensor> mean_similarity) {
  const Arguments a = checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression,
                              spatial_weight, background_suppression, scale_prior, mean_similarity);
  const Outputs out{empty("merged", {a.B(), a.K(), a.D()}, features.scalar_type()),
                    empty("indices", {a.B(), a.K()}, ScalarType::Long),
                    empty("assignment", {a.B(), a.N()}, ScalarType::Long),
                    empty("mass", {a.B(), a.K()}, mass_dtype(features, scores))};
  const Call call(a);
  call.run(out, Workspace(call.bytes()));
  return {out.merged, out.indices, out.assignment, out.mass};
}

void select_and_merge_out(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                          std::optional<Tensor> keys, std::optional<std::vector<int64_t>> grid,
                          std::optional<Tensor> positions, std::optional<Tensor> mask, double suppression,
                          double spatial_weight, std::optional<double> background_suppression, bool scale_prior,
                          std::optional<Tensor> mean_similarity, std::optional<Tensor> workspace, const Tensor& merged,
                          const Tensor& indices, const Tensor& assignment, const Tensor& mass) {
  const Arguments a = checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression,
                              spatial_weight, background_suppression, scale_prior, mean_similarity);
  check_output("merged", merged, "B K D", {a.B(), a.K(), a.D()}, features.scalar_type());
  check_output("indices", indices, "B K", {a.B(), a.K()}, ScalarType::Long);
  check_output("assignment", assignment, "B N", {a.B(), a.N()}, ScalarType::Long);
  check_output("mass", mass, "B K", {a.B(), a.K()}, mass_dtype(features, scores));
  check_apart(
      {Span::written("merged", merged), Span::written("indices", indices), Span::written("assignment", assignment),
       Span::written("mass", mass), workspace ? Span::written("workspace", *workspace) : Span("workspace"),
       Span::read("features", features), Span::read("scores", scores), Span::read("keys", keys),
       Span::read("positions", positions), Span::read("mask", mask), Span::read("mean_similarity", mean_similarity)},
      5);
  const Outputs out{merged, indices, assignment, mass};
  const Call call(a);
  if (workspace) {
    call.run(out, workspace_in(*workspace, call.bytes()));
  } else {
    call.run(out, Workspace(call.bytes()));
  }
}

int64_t workspace_bytes(const Tensor& features, const Tensor& scores, int64_t num_anchors, int64_t num_background,
                        std::optional<Tensor> keys, std::optional<std::vector<int64_t>> grid,
                        std::optional<Tensor> positions, std::optional<Tensor> mask, double suppression,
                        double spatial_weight, std::optional<double> background_suppression, bool scale_prior,
                        std::optional<Tensor> mean_similarity) {
  const Arguments a = checked(features, scores, num_anchors, num_background, keys, grid, positions, mask, suppression,
                              spatial_weight, background_suppression, scale_prior, mean_similarity);
  return Memory::kLine + Call(a).bytes();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) {
  m.impl("select_and_merge", TORCH_BOX(&select_and_merge));
  m.impl("select_and_merge_out", TORCH_BOX(&select_and_merge_out));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
}

}  // namespace condense
