// What ThreadSanitizer sees of the threads of a call (csrc/threads.h): sums of a crew whose scratch is each thread's
// own, or the one of all.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "threads.h"

int main(int, char** arguments) {
  using namespace condense;
  constexpr int kThreads = 4, kRounds = 20, kNumbers = 64;
  const bool is_shared = std::strcmp(arguments[1], "shared") == 0;
  std::vector<int> scratch(kThreads * kNumbers), sums(kThreads);
  std::atomic<int> taken{0};
  int sum = 0;
  with_crew(kThreads, [&](Crew& crew) {
    for (int round = 0; round < kRounds; ++round) {
      crew.run([&](int share) {
        // Each thread takes one share: they wait for each other, which orders nothing that they do.
        taken.fetch_add(1, std::memory_order_relaxed);
        while (taken.load(std::memory_order_relaxed) < kThreads * (round + 1)) std::this_thread::yield();
        int* mine = scratch.data() + (is_shared ? 0 : share * kNumbers);
        for (int i = 0; i < kNumbers; ++i) mine[i] = i;
        sums[share] = 0;
        for (int i = 0; i < kNumbers; ++i) sums[share] += mine[i];
      });
      for (const int part : sums) sum += part;  // the leader's, once all are done
    }
  });
  std::printf("%d\n", sum);
}
