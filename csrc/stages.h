// The stages on one image, as the operators and the flagship share them. T is the working type, float or double.
//
// `slots` is how many threads may share the image; the result does not depend on it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "rowops.h"

namespace condense {

constexpr int8_t kValid = 0, kNonFinite = 1, kMasked = 2, kTaken = 3;  // tiers

// Token rows of any layout: [n, d] with strides in elements.
struct Rows {
  const char* data;
  Dtype dtype;
  int64_t n, d, stride_n, stride_d;

  int64_t element_size() const { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
  const void* at(int64_t i, int64_t c) const { return data + (i * stride_n + c * stride_d) * element_size(); }
};

// Blocks that a thread has freed, for its next call: the C library gives blocks of this size back to the system, and
// faulting their pages in again took up to a third of a call's time.
class FreeBlocks {
 public:
  static FreeBlocks& of_this_thread() {
    thread_local FreeBlocks blocks;
    return blocks;
  }
  FreeBlocks() { blocks_.reserve(kMostBlocks + 1); }  // so that giving a block back cannot fail
  ~FreeBlocks() {
    for (const Block& block : blocks_) ::operator delete(block.data, kAlignment);
  }
  void* take(size_t size) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].size != size) continue;
      void* data = blocks_[i].data;
      kept_ -= size;
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
      return data;
    }
    return ::operator new(size, kAlignment);
  }
  void give(void* data, size_t size) {
    blocks_.push_back({data, size});
    kept_ += size;
    while (kept_ > kMostBytes || blocks_.size() > kMostBlocks) {  // the oldest goes
      kept_ -= blocks_.front().size;
      ::operator delete(blocks_.front().data, kAlignment);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr std::align_val_t kAlignment{64};  // a cache line
  static constexpr size_t kMostBytes = size_t{8} << 20, kMostBlocks = 16;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// Hands out the pieces of one block, uninitialised, each on a cache line of its own; null for none. Without a block it
// counts: the code that takes the pieces is also what says how many bytes they are.
class Memory {
 public:
  static constexpr int64_t kLine = 64;

  Memory() = default;
  Memory(char* block, int64_t size) : block_(block), size_(size) {}
  template <class T>
  T* take(int64_t n) {
    char* piece = block_ + taken_;
    taken_ += (n * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    if (!block_ || n == 0) return nullptr;
    if (taken_ > size_) throw std::logic_error("condense: a kernel took more memory than it had counted.");
    return reinterpret_cast<T*>(piece);
  }
  int64_t taken() const { return taken_; }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0, taken_ = 0;
};

// A call's working memory: the caller's, or a block of this thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(FreeBlocks::of_this_thread().take(bytes)), own_(true) {}
  Workspace(void* data, int64_t bytes) : bytes_(bytes), data_(data), own_(false) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (own_) FreeBlocks::of_this_thread().give(data_, bytes_);
  }
  // Piece i of `bytes` each.
  Memory piece(int64_t i, int64_t bytes) const { return {static_cast<char*>(data_) + i * bytes, bytes}; }

 private:
  int64_t bytes_;
  void* data_;
  bool own_;
};

// Subnormal numbers count while this lives: torch.set_flush_denormal acts on single threads, and a result must not
// depend on which of them computed it.
class KeepSubnormals {
 public:
#if defined(__x86_64__)
  KeepSubnormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ & ~0x8040u);
  }  // neither flush to zero nor read as zero
  ~KeepSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Runs f(slot) for every slot on torch's own threads. torch would replace an exception by one that says nothing.
template <class F>
void for_each_slot(int slots, const F& f) {
  std::vector<std::exception_ptr> failures(slots);
  const auto run = [&](int64_t begin, int64_t end) {
    const KeepSubnormals keep;
    for (int64_t slot = begin; slot < end; ++slot) {
      try {
        f(static_cast<int>(slot));
      } catch (...) {
        failures[slot] = std::current_exception();
      }
    }
  };
  if (slots == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, slots, 1, run);
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

// [lo, hi) of n items for one slot.
struct Share {
  int64_t lo, hi;
  Share(int64_t n, int slot, int slots) : lo(n * slot / slots), hi(n * (slot + 1) / slots) {}
};

// Two factors whose product is 2^-e, where 2^e is the smallest power of two above magnitude (frexp's e): 2^-e itself
// may not be representable.
template <class T>
struct Shrink {
  explicit Shrink(T magnitude) {
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    first = std::ldexp(T{1}, -(exponent / 2));
    second = std::ldexp(T{1}, exponent / 2 - exponent);
  }
  T operator()(T x) const { return x * first * second; }
  T first, second;
};

// Threads worth waking for so many multiply-adds.
inline int slots_for(double work, int64_t most) {
  constexpr double kWorthAThread = 1 << 17;  // some ten microseconds, what a parallel region costs
  const auto threads = static_cast<double>(torch::stable::get_num_threads());
  return static_cast<int>(std::max(1.0, std::min({threads, static_cast<double>(most), work / kWorthAThread})));
}

// How the images of a batch share the threads: side by side where they fill them, else one after the other with all
// threads on each.
struct Schedule {
  int at_a_time;  // images
  int slots;      // threads of an image

  // `work` is what an image costs, in multiply-adds.
  Schedule(int64_t images, double work) {
    const int64_t threads = torch::stable::get_num_threads();
    const bool side_by_side = images % threads == 0 || images >= 4 * threads;
    at_a_time = side_by_side ? slots_for(static_cast<double>(images) * work, images) : 1;
    slots = side_by_side ? 1 : slots_for(work, threads);
  }
};

// Runs f(image, memory) for every image, memory being `bytes` of the workspace.
template <class F>
void for_each_image(int64_t images, const Schedule& schedule, const Workspace& workspace, int64_t bytes, const F& f) {
  for_each_slot(schedule.at_a_time, [&](int slot) {
    const Share share(images, slot, schedule.at_a_time);
    for (int64_t b = share.lo; b < share.hi; ++b) f(b, workspace.piece(slot, bytes));
  });
}

// The same for an operator of its own, f(image, slots, pieces): Pieces(memory, slots) takes what an image needs.
template <class Pieces, class F>
void for_each_image(int64_t images, double work, const Pieces& pieces, const F& f) {
  const Schedule schedule(images, work);
  Memory count;
  pieces(count, schedule.slots);
  const Workspace workspace(schedule.at_a_time * count.taken());
  for_each_image(images, schedule, workspace, count.taken(), [&](int64_t b, Memory memory) {
    auto taken = pieces(memory, schedule.slots);
    f(b, schedule.slots, taken);
  });
}

// A key as the similarities use it.
template <class T>
struct KeyFactors {
  KeyFactors(Memory& memory, int64_t n) : scale(memory.take<T>(n)), inv(memory.take<T>(n)) {}
  T* scale;  // [n] power of two, exact
  T* inv;    // [n] 1 / norm of the scaled key, 0 for a token without similarities
};

// What one thread multiplies tiles in.
template <class T>
struct TileMemory {
  TileMemory(Memory& memory, int64_t n, bool stored);
  T *rows, *panels, *tile, *mirror, *block, *piece;
  int64_t* g;  // [n padded] fixed point
  int64_t magnitudes;
};

template <class T>
struct SimilarityMemory {
  SimilarityMemory(Memory& memory, int64_t n, int slots, bool stored);
  KeyFactors<T> factors;
  std::vector<TileMemory<T>> of_slot;
  double* sums;  // [n] fp64 alone
  T* strip;      // [kTile, width_of(n)] fp64 alone, where s is not stored
};

// Length of a row of similarities that is a whole number of tiles.
constexpr int64_t width_of(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// sbar [1], g [n], tier [n], and s [n, n] contiguous unless it is null: then tiles are dropped once they are summed.
// scores may be null, and so may mask.
template <class T>
void similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, int slots, SimilarityMemory<T>& memory,
                      T* s, T* sbar, T* g, int8_t* tier);

// square [count, count]: the similarities among some tokens, after similarity_image; its bits.
template <class T>
void similarity_among(const Rows& keys, const int64_t* tokens, int64_t count, int slots, SimilarityMemory<T>& memory,
                      T* square);

// rows [count, width_of(n)]: those of some tokens; its bits. Up to kTile - 1 more rows are written.
template <class T>
void similarity_rows(const Rows& keys, const int64_t* tokens, int64_t count, int slots, SimilarityMemory<T>& memory,
                     T* rows);

template <class T>
struct GreedyMemory {
  GreedyMemory(Memory& memory, int64_t n) : nu(memory.take<T>(n)), m(memory.take<T>(n)) {}
  T *nu, *m;
};

// order [k]. s has rows of ld. sbar null: prior is the utility; tier null: all tokens are valid.
template <class T>
void greedy_select_image(const T* s, int64_t ld, const T* prior, const T* sbar, const int8_t* tier, int64_t n,
                         int64_t k, T suppression, const GreedyMemory<T>& memory, int64_t* order);

template <class T>
struct StreamedGreedyMemory {
  StreamedGreedyMemory(Memory& memory, int64_t n);
  GreedyMemory<T> all, pool;
  T *t, *pool_t, *square;
  int64_t* tokens;
};

// The same picks without s, whose rows are computed once they are needed: rows [picks, width_of(n)] are those of the
// picked tokens, in the order of the picks. Returns their number; what follows in order has no similarities.
template <class T>
int64_t greedy_select_streamed(const Rows& keys, const T* prior, const T* sbar, const int8_t* tier, int64_t k,
                               T suppression, int slots, SimilarityMemory<T>& similarity,
                               const StreamedGreedyMemory<T>& memory, int64_t* order, T* rows);

// Coordinates as [num_axes, n], scaled, and what Eq. 6 multiplies a distance with.
template <class T>
struct Layout {
  Layout(Memory& memory, int64_t n, int64_t num_axes)
      : positions(memory.take<T>(num_axes * n)), num_axes(num_axes), factor(0) {}
  // Row-major grid of num_axes sizes, whose product is n.
  void set_grid(const int64_t* grid, int64_t n, const int8_t* tier, double spatial_weight);
  // places [num_axes, n].
  void set_positions(const double* places, int64_t n, const int8_t* tier, double spatial_weight);

  T* positions;
  int64_t num_axes;  // 0: no distance
  T factor;
};

template <class T>
struct AssignMemory {
  AssignMemory(Memory& memory, int64_t n, int64_t k)
      : best(memory.take<T>(n)),
        best_row(memory.take<typename RowOps<T>::Index>(n)),
        s_rows(memory.take<const T*>(k)) {}
  T* best;
  typename RowOps<T>::Index* best_row;
  const T** s_rows;  // [k] the similarities of each kept token, filled by the caller
};

// assignment [n]. indices [k] in [-1, n).
template <class T>
void assign_image(const int64_t* indices, const int8_t* tier, const Layout<T>& layout, int64_t n, int64_t k, int slots,
                  const AssignMemory<T>& memory, int64_t* assignment);

template <class T>
struct MergeMemory {
  MergeMemory(Memory& memory, int64_t n, int64_t d, int64_t k, int slots)
      : first(memory.take<int64_t>(k + 2)), members(memory.take<int64_t>(n)), rows(memory.take<T>(3 * slots * d)) {}
  int64_t *first, *members;
  T* rows;  // [slots, 3, d]
};

// merged [k, d] contiguous in the dtype of features, mass [k]. indices in [-1, n), assignment in [-1, k).
template <class T>
void merge_image(const Rows& features, const T* scores, const int64_t* indices, const int64_t* assignment, int64_t k,
                 int slots, const MergeMemory<T>& memory, void* merged, T* mass);

}  // namespace condense
