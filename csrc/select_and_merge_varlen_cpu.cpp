// The flagship on a packed batch: every segment is an image, and runs the code of the dense operator.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "packed.h"
#include "select_and_merge.h"

namespace condense {
namespace {

// What a segment keeps of the packed tokens and rows; none of the counts is 0.
struct Segment {
  int64_t number, first_token, num_tokens, first_row, num_anchors, num_background;

  int64_t num_rows() const { return num_anchors + num_background; }
};

// The packed batch as one image, of which a segment is a part.
struct Packed {
  Image tokens;
  Results results;
  int64_t total_keep, row_bytes, mass_bytes;
  const std::optional<Tensor>& mean_similarity;

  Image image(const Segment& segment) const {
    const int64_t first = segment.first_token;
    Image part = tokens;
    part.features = tokens.features.part(first, segment.num_tokens);
    part.keys = tokens.keys.part(first, segment.num_tokens);
    part.scores = tokens.scores.from(first);
    part.space = tokens.space.from(first);
    part.num_anchors = segment.num_anchors;
    part.num_background = segment.num_background;
    part.mean_similarity = number_of(mean_similarity, segment.number);
    return part;
  }
  Results results_of(const Segment& segment) const {
    return {results.merged + segment.first_row * row_bytes, results.indices + segment.first_row,
            results.assignment + segment.first_token, results.mass + segment.first_row * mass_bytes};
  }

  // Rows that no segment fills, and tokens of no segment.
  void clear_rows(int64_t first, int64_t end) const {
    std::fill(results.merged + first * row_bytes, results.merged + end * row_bytes, 0);
    std::fill(results.indices + first, results.indices + end, -1);
    std::fill(results.mass + first * mass_bytes, results.mass + end * mass_bytes, 0);
  }
  void clear_tokens(int64_t first, int64_t end) const {
    std::fill(results.assignment + first, results.assignment + end, -1);
  }
};

// The segments that have a token and a row, in their order. One that is longer than max_seqlen has none.
std::vector<Segment> segments_of(const Tensor& cu_seqlens, const Tensor& cu_anchors, const Tensor& cu_background,
                                 int64_t num_tokens, int64_t total_keep, int64_t max_seqlen) {
  std::vector<int64_t> tokens = read_offsets(cu_seqlens), rows = read_offsets(cu_background);
  const std::vector<int64_t> anchors = read_offsets(cu_anchors);
  for (size_t s = 0; s < rows.size(); ++s) rows[s] += anchors[s];
  bound(tokens, num_tokens);
  bound(rows, total_keep);
  auto segments = list_of<Segment>(static_cast<int64_t>(tokens.size()) - 1, "for the segments");
  for (size_t s = 0; s + 1 < tokens.size(); ++s) {
    const int64_t n = tokens[s + 1] - tokens[s], k = std::min(n, rows[s + 1] - rows[s]);
    if (k == 0 || n > max_seqlen) continue;
    const int64_t num_anchors = std::clamp<int64_t>(anchors[s + 1] - anchors[s], 0, k);
    segments.push_back({static_cast<int64_t>(s), tokens[s], n, rows[s], num_anchors, k - num_anchors});
  }
  return segments;
}

void clear_between(const std::vector<Segment>& segments, const Packed& packed) {
  int64_t token = 0, row = 0;
  for (const Segment& segment : segments) {
    packed.clear_tokens(token, segment.first_token);
    packed.clear_rows(row, segment.first_row);
    token = segment.first_token + segment.num_tokens;
    row = segment.first_row + segment.num_rows();
  }
  packed.clear_tokens(token, packed.tokens.N());
  packed.clear_rows(row, packed.total_keep);
}

// Neighbouring segments [first, end) that one thread takes at once: a large one alone, or small ones, whose results
// share cache lines.
struct Turn {
  int64_t first, end;
  double work;
};

std::vector<Turn> turns_of(const std::vector<Segment>& segments, const Packed& packed) {
  const auto work_of = [&](const Segment& segment) { return packed.image(segment).work().all; };
  double total = 0;
  for (const Segment& segment : segments) total += work_of(segment);
  const double most = std::min(kWorthAThread, total / (8.0 * torch::stable::get_num_threads()));
  auto turns = list_of<Turn>(static_cast<int64_t>(segments.size()), "for the segments");
  for (size_t s = 0; s < segments.size(); ++s) {
    const double work = work_of(segments[s]);
    const auto at = static_cast<int64_t>(s);
    if (turns.empty() || turns.back().work + work > most) turns.push_back({at, at, 0});
    turns.back().end = at + 1;
    turns.back().work += work;
  }
  std::sort(turns.begin(), turns.end(), [](const Turn& x, const Turn& y) { return x.work > y.work; });
  return turns;
}

// How many turns, the largest, go one after the other with all threads on each, as side by side they would leave
// threads idle. `turns` are sorted, largest first.
int64_t count_giants(const std::vector<Turn>& turns, double total) {
  constexpr double kFine = 0.25;     // of a thread's share: what is smaller fills the gaps that others leave
  constexpr double kUneven = 1.125;  // idle threads may cost that much: a greedy loop, too, leaves all but one idle
  const int threads = torch::stable::get_num_threads();
  std::vector<double> loads(threads);  // of the threads, when large turns go side by side
  double rest = total;
  const auto is_large = [&](const Turn& turn) {
    return turn.work > kFine * rest / threads && slots_for(turn.work, threads) > 1;
  };
  size_t large = 0;
  for (; large < turns.size() && is_large(turns[large]); rest -= turns[large++].work) {
    *std::min_element(loads.begin(), loads.end()) += turns[large].work;
  }
  const double last = *std::max_element(loads.begin(), loads.end());
  return last > kUneven * total / threads ? static_cast<int64_t>(large) : 0;
}

void condense_segments(const std::vector<Segment>& segments, const Packed& packed, const Flagship& flagship) {
  const std::vector<Turn> turns = turns_of(segments, packed);
  const auto work_from = [&](int64_t first) {
    return std::accumulate(turns.begin() + first, turns.end(), 0.0, [](double w, const Turn& t) { return w + t.work; });
  };
  const auto most_bytes = [&](int64_t from, int64_t to, int slots) {
    int64_t most = 0;
    for (int64_t t = from; t < to; ++t) {
      for (int64_t s = turns[t].first; s < turns[t].end; ++s) {
        most = std::max(most, flagship.image_bytes(packed.image(segments[s]), slots));
      }
    }
    return most;
  };
  const auto count = static_cast<int64_t>(turns.size());
  const int64_t giants = count_giants(turns, work_from(0));
  const Schedule of_giants{1, slots_for(turns[0].work, torch::stable::get_num_threads())},
      of_rest{slots_for(work_from(giants), count - giants), 1};
  const int64_t giant_bytes = most_bytes(0, giants, of_giants.slots), rest_bytes = most_bytes(giants, count, 1);
  const Workspace workspace(std::max(giant_bytes, of_rest.at_a_time * rest_bytes));
  const auto take = [&](const Turn& turn, Memory memory, Crew& crew) {
    for (int64_t s = turn.first; s < turn.end; ++s) {
      flagship.condense_image(packed.image(segments[s]), packed.results_of(segments[s]), memory, crew);
    }
  };
  for_each_image(giants, of_giants, workspace, giant_bytes,
                 [&](int64_t t, Memory memory, Crew& crew) { take(turns[t], memory, crew); });
  for_each_image(count - giants, of_rest, workspace, rest_bytes,
                 [&](int64_t t, Memory memory, Crew& crew) { take(turns[giants + t], memory, crew); });
}

void check_arguments(const Tensor& features, const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_anchors,
                     const Tensor& cu_background, int64_t total_keep, int64_t max_seqlen,
                     const std::optional<Tensor>& keys, const std::optional<Tensor>& positions, double suppression,
                     double spatial_weight, std::optional<double> background_suppression,
                     const std::optional<Tensor>& mean_similarity) {
  check_rank("features", features, "T D", 2);
  check_floating("features", features);
  check_not_empty("features", features, 1, "channel");
  const int64_t T = features.size(0);
  check_shape("scores", scores, "T", {T});
  check_floating("scores", scores);
  check_segments(cu_seqlens, max_seqlen);
  const std::vector<int64_t> offsets = {cu_seqlens.size(0)};
  check_shape("cu_anchors", cu_anchors, "S+1", offsets);
  check_dtype("cu_anchors", cu_anchors, {ScalarType::Int}, "int32");
  check_shape("cu_background", cu_background, "S+1", offsets);
  check_dtype("cu_background", cu_background, {ScalarType::Int}, "int32");
  check_count("total_keep", total_keep, T, "T");
  if (keys) {
    check_rank("keys", *keys, "T Dk", 2);
    check_shape("keys", *keys, "T Dk", {T, keys->size(1)});
    check_floating("keys", *keys);
    check_not_empty("keys", *keys, 1, "channel");
  }
  check_weight("suppression", suppression);
  check_weight("spatial_weight", spatial_weight);
  check_weight("background_suppression", background_suppression);
  check_packed_positions(positions, spatial_weight, T);
  if (mean_similarity) {
    check_shape("mean_similarity", *mean_similarity, "S", {cu_seqlens.size(0) - 1});
    check_working("mean_similarity", *mean_similarity);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_and_merge_varlen(
    const Tensor& features, const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_anchors,
    const Tensor& cu_background, int64_t total_keep, int64_t max_seqlen, std::optional<Tensor> keys,
    std::optional<Tensor> positions, double suppression, double spatial_weight,
    std::optional<double> background_suppression, bool scale_prior, std::optional<Tensor> mean_similarity) {
  check_arguments(features, scores, cu_seqlens, cu_anchors, cu_background, total_keep, max_seqlen, keys, positions,
                  suppression, spatial_weight, background_suppression, mean_similarity);
  const int64_t T = features.size(0), D = features.size(1);
  const Tensor merged = empty("merged", {total_keep, D}, features.scalar_type());
  const Tensor indices = empty("indices", {total_keep}, ScalarType::Long);
  const Tensor assignment = empty("assignment", {T}, ScalarType::Long);
  const Tensor mass = empty("mass", {total_keep}, mass_dtype(features, scores));
  const Tensor& k = keys ? *keys : features;
  const Space space = space_of(std::nullopt, positions, spatial_weight, 0);
  const Packed packed{{rows_of(features),
                       rows_of(k),
                       column_of(scores),
                       {},
                       space,
                       0,
                       0,
                       suppression,
                       background_suppression.value_or(suppression),
                       scale_prior,
                       {}},
                      {output<char>(merged), output<int64_t>(indices), output<int64_t>(assignment), output<char>(mass)},
                      total_keep,
                      D * static_cast<int64_t>(merged.element_size()),
                      static_cast<int64_t>(mass.element_size()),
                      mean_similarity};
  const std::vector<Segment> segments = segments_of(cu_seqlens, cu_anchors, cu_background, T, total_keep, max_seqlen);
  clear_between(segments, packed);
  if (!segments.empty()) condense_segments(segments, packed, flagship_for(features, scores, k));
  return {merged, indices, assignment, mass};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(condense, CPU, m) { m.impl("select_and_merge_varlen", TORCH_BOX(&select_and_merge_varlen)); }

}  // namespace condense
