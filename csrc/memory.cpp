// Blocks of working memory, between calls.
#include "memory.h"

#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace condense {
namespace {

constexpr std::align_val_t kLine{64};             // of a cache
constexpr size_t kPage = size_t{2} << 20;         // a huge one
constexpr size_t kLarge = 2 * kPage;              // from here on a block has pages of its own
constexpr size_t kMostBytes = size_t{160} << 20;  // kept: two images of 4096 tokens in fp32, or one in fp64
constexpr size_t kMostBlocks = 64;                // kept
constexpr uint64_t kMostCalls = 1000;             // in which nobody has taken it, and a block is kept

// In eight steps a doubling, so that calls of nearly the same size share a block; what a call does not touch takes no
// memory. A large block is a whole number of pages of 512 KB.
size_t rounded(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() / 4) throw std::bad_alloc();
  size_t step = static_cast<size_t>(kLine);
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

#if defined(__linux__)

// Huge pages, where the system gives them, are faulted in in an eighth of the time. The last bytes are on small ones,
// so that no more memory is touched than was asked for.
void* new_pages(size_t size, size_t bytes) {
  void* mapped = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* first = static_cast<char*>(mapped);
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(first) % kPage) % kPage;
  if (before > 0) munmap(first, before);
  first += before;
  if (before < kPage) munmap(first + size, kPage - before);
  madvise(first, bytes / kPage * kPage, MADV_HUGEPAGE);
  return first;
}
void delete_pages(const Block& block) { munmap(block.data, block.size); }
void advise_huge_pages(void* first, size_t bytes) { madvise(first, bytes, MADV_HUGEPAGE); }

#else

void* new_pages(size_t size, size_t) { return ::operator new(size, kLine); }
void delete_pages(const Block& block) { ::operator delete(block.data, kLine); }
void advise_huge_pages(void*, size_t) {}

#endif

Block new_block(size_t bytes) {
  const size_t size = rounded(bytes);
  return {size < kLarge ? ::operator new(size, kLine) : new_pages(size, bytes), size};
}
void delete_block(const Block& block) {
  allow(block.data, block.size);
  if (block.size < kLarge) {
    ::operator delete(block.data, kLine);
  } else {
    delete_pages(block);
  }
}

// One for all threads: those that are idle hold nothing, and who calls from another thread each time finds its block.
class FreeBlocks {
 public:
  FreeBlocks() { blocks_.reserve(kMostBlocks + 1); }  // so that giving a block back cannot fail

  // The smallest that is large enough, of these the one used last; none where all are more than twice as large.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
      if (at->block.size < bytes || at->block.size / 2 > bytes) continue;
      if (best == blocks_.end() || at->block.size <= best->block.size) best = at;
    }
    if (best == blocks_.end()) return {nullptr, 0};
    const Block found = best->block;
    kept_ -= found.size;
    blocks_.erase(best);
    return found;
  }

  // The system's calls are made without the lock, which nobody then waits for.
  void give(const Block& block) {
    if (block.size > kMostBytes) return delete_block(block);  // the others may stay
    Block dropped[kMostBlocks + 1];
    size_t count = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back({block, ++calls_});
      kept_ += block.size;
      const auto is_over = [&](const Kept& oldest) {
        return kept_ > kMostBytes || blocks_.size() - count > kMostBlocks || calls_ - oldest.call > kMostCalls;
      };
      while (is_over(blocks_[count])) {
        kept_ -= blocks_[count].block.size;
        dropped[count] = blocks_[count].block;
        ++count;
      }
      blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<std::ptrdiff_t>(count));
    }
    for (size_t i = 0; i < count; ++i) delete_block(dropped[i]);
  }

  // Held over a fork, whose child has one thread and would wait for another's lock.
  std::mutex& mutex() { return mutex_; }

 private:
  struct Kept {
    Block block;
    uint64_t call;  // that gave it back
  };
  std::mutex mutex_;
  std::vector<Kept> blocks_;  // the oldest first
  size_t kept_ = 0;           // bytes
  uint64_t calls_ = 0;
};

// Never destroyed: threads may outlive what a process destroys at its end.
FreeBlocks& free_blocks() {
  static FreeBlocks* const blocks = [] {
    auto* made = new FreeBlocks;
#if defined(__linux__)
    pthread_atfork([] { free_blocks().mutex().lock(); }, [] { free_blocks().mutex().unlock(); },
                   [] { free_blocks().mutex().unlock(); });
#endif
    return made;
  }();
  return *blocks;
}

}  // namespace

Block take_block(size_t bytes) {
  const Block kept = free_blocks().take(bytes);
  return kept.data ? kept : new_block(bytes);
}

void give_block(Block block) noexcept {
  forbid(block.data, block.size);
  free_blocks().give(block);
}

void on_huge_pages(void* data, size_t bytes) noexcept {
  constexpr size_t kMapped = size_t{32} << 20;  // the most that the C library may keep for itself
  if (bytes <= kMapped) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  advise_huge_pages(reinterpret_cast<void*>(first), end - first);
}

}  // namespace condense
