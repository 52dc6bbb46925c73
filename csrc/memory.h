// The working memory of a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace condense {

// For a thing of `count` parts of `size` bytes each; a product beyond int64 is said to be what int64 can hold.
inline int64_t bytes_of(int64_t count, int64_t size) {
  int64_t bytes;
  return __builtin_mul_overflow(count, size, &bytes) ? std::numeric_limits<int64_t>::max() : bytes;
}

[[noreturn]] inline void fail_to_allocate(int64_t bytes, const std::string& what) {
  throw std::runtime_error("could not allocate " + std::to_string(bytes) +
                           (bytes == std::numeric_limits<int64_t>::max() ? " or more" : "") + " bytes " + what +
                           ". Remedy: fewer images a call, fewer tokens kept, or smaller windows.");
}

// An empty list that has room for n; `what` they are.
template <class T>
std::vector<T> list_of(int64_t n, const std::string& what) {
  std::vector<T> list;
  try {
    list.reserve(n);
  } catch (const std::exception&) {  // bad_alloc, length_error
    fail_to_allocate(bytes_of(n, sizeof(T)), what);
  }
  return list;
}

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
  static constexpr std::align_val_t kAlignment{64};                         // a cache line
  static constexpr size_t kMostBytes = size_t{40} << 20, kMostBlocks = 16;  // s of 2880 tokens is 33 MB
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// Hands out the pieces of one block, uninitialised, each on a cache line of its own; null for none. Without a block it
// counts: the code that takes the pieces is also what says how many bytes they are.
class Memory {
 public:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kTooMuch = int64_t{1} << 50;  // no machine has it, and the sum of many still fits

  Memory() = default;
  Memory(char* block, int64_t size) : block_(block), size_(size) {}
  template <class T>
  T* take(int64_t n, int64_t times = 1) {
    const int64_t start = at_, bytes = std::min(bytes_of(bytes_of(n, times), sizeof(T)), kTooMuch);
    at_ += (bytes + kLine - 1) / kLine * kLine;
    taken_ = std::max(taken_, at_);
    if (!block_ || n == 0) return nullptr;
    if (taken_ > size_) throw std::logic_error("condense: a kernel took more memory than it had counted.");
    return reinterpret_cast<T*>(block_ + start);
  }
  int64_t taken() const { return taken_; }

  // From here on take what was taken since `at` once more: nobody needs that any longer.
  int64_t at() const { return at_; }
  Memory& rewound(int64_t at) {
    at_ = at;
    return *this;
  }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0, at_ = 0, taken_ = 0;
};

// A call's working memory: the caller's, or a block of this thread.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(taken(bytes)), own_(true) {}
  Workspace(void* data, int64_t bytes) : bytes_(bytes), data_(data), own_(false) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (own_) FreeBlocks::of_this_thread().give(data_, bytes_);
  }
  // Piece i of `bytes` each.
  Memory piece(int64_t i, int64_t bytes) const {
    if ((i + 1) * bytes > bytes_) throw std::logic_error("condense: more threads than the workspace was counted for.");
    return {static_cast<char*>(data_) + i * bytes, bytes};
  }

 private:
  static void* taken(int64_t bytes) {
    try {
      return FreeBlocks::of_this_thread().take(bytes);
    } catch (const std::bad_alloc&) {
      fail_to_allocate(bytes, "of working memory");
    }
  }
  int64_t bytes_;
  void* data_;
  bool own_;
};

}  // namespace condense
