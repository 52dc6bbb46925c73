// The threads of a call: torch's own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "memory.h"
#include "sanitizers.h"
#include "subnormals.h"

namespace condense {

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see torch's threads meet, which libgomp lets them do by system calls of its own.
template <class F>
void parallel_for(int slots, const F& run) {
  std::vector<std::thread> threads;
  for (int slot = 1; slot < slots; ++slot) threads.emplace_back([&run, slot] { run(slot, slot + 1); });
  run(0, 1);
  for (std::thread& thread : threads) thread.join();
}
#else
template <class F>
void parallel_for(int slots, const F& run) {
  torch::stable::parallel_for(0, slots, 1, run);
}
#endif

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
    parallel_for(slots, run);
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

// The threads of one image, in one parallel region from its first stage to its last: the calling thread leads, the
// others help with what it shares out. Whose core is busy elsewhere comes late, and finds its shares taken.
class Crew {
 public:
  explicit Crew(int size) : size_(size), failures_(size) {}
  int size() const { return size_; }

  // The leader's: runs f(share) for every share in [0, size()), each once, and returns when all are done.
  template <class F>
  void run(const F& f) {
    if (size_ == 1) return f(0);
    call_ = [](const void* shared, int share) { (*static_cast<const F*>(shared))(share); };
    shared_ = &f;
    done_.store(0, std::memory_order_relaxed);
    round_ += kRound;
    next_.store(round_, std::memory_order_release);
    while (take_share()) continue;
    for (int spins = 0; done_.load(std::memory_order_acquire) < size_;) wait(spins);
    for (std::exception_ptr& failure : failures_) {
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
  }

  // The others': takes shares until the leader has gone.
  void help() {
    for (int spins = 0; !gone_.load(std::memory_order_acquire);) {
      if (take_share()) {
        spins = 0;
      } else {
        wait(spins);
      }
    }
  }
  void leave() { gone_.store(true, std::memory_order_release); }

 private:
  // A number of rounds and, below it, the next share: who takes a share knows it to be of the round that he saw.
  static constexpr uint64_t kRound = uint64_t{1} << 32;

  bool take_share() {
    uint64_t next = next_.load(std::memory_order_acquire);
    while (next % kRound < static_cast<uint64_t>(size_)) {
      if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
      const int share = static_cast<int>(next % kRound);
      try {
        call_(shared_, share);
      } catch (...) {
        failures_[share] = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  // Some microseconds awake, then the core goes to whoever wants it.
  static void wait(int& spins) {
    constexpr int kAwake = 2000;
    if (++spins > kAwake) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // some ten cycles; yield, meant for this, is none at all on most processors
#endif
  }

  const int size_;
  void (*call_)(const void*, int) = nullptr;
  const void* shared_ = nullptr;
  uint64_t round_ = 0;
  std::vector<std::exception_ptr> failures_;
  alignas(64) std::atomic<uint64_t> next_{kRound - 1};  // of no round: no share is left
  alignas(64) std::atomic<int> done_{0};
  std::atomic<bool> gone_{false};
};

// Runs f(crew) on the calling thread, with size - 1 helpers beside it.
template <class F>
void with_crew(int size, const F& f) {
  Crew crew(size);
  for_each_slot(size, [&](int slot) {
    if (slot > 0) return crew.help();
    struct Leave {
      Crew& crew;
      ~Leave() { crew.leave(); }
    } leave{crew};
    f(crew);
  });
}

// What a call costs, in numbers that a loop over rows passes: some 0.15 ns each. `shared` is what the threads of an
// image can divide among them.
struct Work {
  Work(double all) : Work(all, all) {}
  Work(double all, double shared) : all(all), shared(shared) {}
  Work& operator+=(const Work& other) {
    all += other.all;
    shared += other.shared;
    return *this;
  }
  // That of each of so many images, on average.
  Work operator/(int64_t images) const {
    const auto count = static_cast<double>(std::max<int64_t>(images, 1));
    return {all / count, shared / count};
  }
  double all, shared;
};

// Multiply-adds of tiles, of which a thread makes some 200 in a nanosecond.
constexpr double products(double multiply_adds) { return multiply_adds / 32; }

// Some fifteen microseconds: a parallel region costs five, and more where other programs use the cores.
constexpr double kWorthAThread = 100000;

// Threads worth waking for so much work.
inline int slots_for(double work, int64_t most) {
  const auto threads = static_cast<double>(torch::stable::get_num_threads());
  return static_cast<int>(std::max(1.0, std::min({threads, static_cast<double>(most), work / kWorthAThread})));
}

// How the images of a batch share the threads: side by side where they fill them, else one after the other with all
// threads on each.
struct Schedule {
  int at_a_time;          // images
  int slots;              // threads of an image
  int64_t in_a_turn = 1;  // images that a thread takes at once, neighbours: their results share cache lines

  // `work` is that of an image.
  static Schedule for_batch(int64_t images, Work work) {
    constexpr double kTogether = 1.1;  // of its time an image takes where threads share it: they wait for each other
    const int64_t threads = torch::stable::get_num_threads();
    const auto count = static_cast<double>(images);
    const int slots = slots_for(work.shared, threads), at_a_time = slots_for(count * work.all, images);
    const double in_turn = count * (work.all - work.shared + work.shared / slots) * kTogether;
    if (slots > 1 && in_turn < std::ceil(count / at_a_time) * work.all) return {1, slots};
    const double turn = std::min(kWorthAThread / std::max(work.all, 1.0), count / (8.0 * at_a_time));
    return {at_a_time, 1, std::max<int64_t>(1, turn)};
  }
};

// Runs f(image, memory, crew) for every image, memory being `bytes` of the workspace.
template <class F>
void for_each_image(int64_t images, const Schedule& schedule, const Workspace& workspace, int64_t bytes, const F& f) {
  if (images == 0) return;
  if (schedule.slots > 1) {
    return with_crew(schedule.slots, [&](Crew& crew) {
      for (int64_t b = 0; b < images; ++b) f(b, workspace.piece(0, bytes), crew);
    });
  }
  std::atomic<int64_t> next{0};
  for_each_slot(schedule.at_a_time, [&](int slot) {
    Crew alone(1);
    for (int64_t b; (b = next.fetch_add(schedule.in_a_turn)) < images;) {
      const int64_t end = std::min(b + schedule.in_a_turn, images);
      for (; b < end; ++b) f(b, workspace.piece(slot, bytes), alone);
    }
  });
}

// The same for an operator of its own, f(image, pieces, crew): Pieces(memory, slots) takes what an image needs.
template <class Pieces, class F>
void for_each_image(int64_t images, Work work, const Pieces& pieces, const F& f) {
  const Schedule schedule = Schedule::for_batch(images, work);
  Memory count;
  pieces(count, schedule.slots);
  const Workspace workspace(schedule.at_a_time * count.taken());
  for_each_image(images, schedule, workspace, count.taken(), [&](int64_t b, Memory memory, Crew& crew) {
    auto taken = pieces(memory, schedule.slots);
    f(b, taken, crew);
  });
}

}  // namespace condense
