// The flagship on one image, for the operators that lead to it: an image of a batch, or a segment of a packed one.
#pragma once

#include <optional>

#include "stages.h"
#include "tensors.h"

namespace condense {

struct Image {
  Rows features, keys;  // [N, D], [N, Dk]
  Column scores, mask;  // [N]; the mask may be missing
  Space space;
  int64_t num_anchors, num_background;
  double suppression, background_suppression;
  bool scale_prior;                       // to the mean similarity; false: priors are utilities
  std::optional<double> mean_similarity;  // else it is computed

  int64_t N() const { return features.n; }
  int64_t D() const { return features.d; }
  int64_t K() const { return num_anchors + num_background; }
  int64_t similarity_bytes() const {
    return keys.dtype == Dtype::kFloat64 || scores.dtype == ScalarType::Double ? sizeof(double) : sizeof(float);
  }
  Work work() const;
};

// Where an image's results go, contiguous.
struct Results {
  char* merged;         // [K, D] in the dtype of features
  int64_t* indices;     // [K]
  int64_t* assignment;  // [N]
  char* mass;           // [K] of the merge's working type
};

// The flagship in the working types of a call.
struct Flagship {
  int64_t (*image_bytes)(const Image&, int slots);  // of memory, while an image is in flight on so many threads
  void (*condense_image)(const Image&, const Results&, Memory, Crew&);
};

Flagship flagship_for(const Tensor& features, const Tensor& scores, const Tensor& keys);

// The dtype of mass.
ScalarType mass_dtype(const Tensor& features, const Tensor& scores);

}  // namespace condense
