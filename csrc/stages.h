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
  static constexpr size_t kMostBytes = size_t{8} << 20, kMostBlocks = 64;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// Uninitialised, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(std::max<int64_t>(size, 1) * sizeof(T)),
        data_(static_cast<T*>(FreeBlocks::of_this_thread().take(bytes_))) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() {
    if (data_) FreeBlocks::of_this_thread().give(data_, bytes_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
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

// Runs f(image, slots) for every image: images side by side where they fill the threads, else one after the other
// with all threads on each. `work` is what an image costs, in multiply-adds.
template <class F>
void for_each_image(int64_t images, double work, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (images % threads == 0 || images >= 4 * threads) {
    const int slots = slots_for(static_cast<double>(images) * work, images);
    for_each_slot(slots, [&](int slot) {
      const Share share(images, slot, slots);
      for (int64_t b = share.lo; b < share.hi; ++b) f(b, 1);
    });
  } else {
    const KeepSubnormals keep;
    for (int64_t b = 0; b < images; ++b) f(b, slots_for(work, threads));
  }
}

// s [n, n] contiguous, sbar [1], g [n], tier [n]. scores may be null, and so may mask.
template <class T>
void similarity_image(const Rows& keys, const T* scores, const uint8_t* mask, int slots, T* s, T* sbar, T* g,
                      int8_t* tier);

// order [k]. s has rows of ld. sbar null: prior is the utility; tier null: all tokens are valid.
template <class T>
void greedy_select_image(const T* s, int64_t ld, const T* prior, const T* sbar, const int8_t* tier, int64_t n,
                         int64_t k, T suppression, int64_t* order);

// Coordinates as [num_axes, n], scaled, and what Eq. 6 multiplies a distance with.
template <class T>
struct Layout {
  Buffer<T> positions;
  int64_t num_axes;
  T factor;

  static Layout none() { return {Buffer<T>(0), 0, T{0}}; }
  // Row-major grid of num_axes sizes, whose product is n.
  static Layout of_grid(const int64_t* grid, int64_t num_axes, int64_t n, const int8_t* tier, double spatial_weight);
  // positions [n, num_axes] contiguous.
  static Layout of_positions(const double* positions, int64_t num_axes, int64_t n, const int8_t* tier,
                             double spatial_weight);
};

// assignment [n]. indices [k] in [-1, n).
template <class T>
void assign_image(const T* s, int64_t ld, const int64_t* indices, const int8_t* tier, const Layout<T>& layout,
                  int64_t n, int64_t k, int slots, int64_t* assignment);

// merged [k, d] contiguous in the dtype of features, mass [k]. indices in [-1, n), assignment in [-1, k).
template <class T>
void merge_image(const Rows& features, const T* scores, const int64_t* indices, const int64_t* assignment, int64_t k,
                 int slots, void* merged, T* mass);

}  // namespace condense
