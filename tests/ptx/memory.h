// Memory that watches its use: bounds, alignment, bytes that nobody has written, accesses that no barrier orders.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "numbers.h"

namespace ptx {

// What is found, in the order of `enum Kind`; program.py reads the names.
#define PTX_KINDS(X)                                              \
  X(kOutOfBounds, "out of bounds")                                \
  X(kMisaligned, "misaligned")                                    \
  X(kRace, "race between warps")                                  \
  X(kRaceSame, "race between warps, same value")                  \
  X(kRaceCtas, "race between CTAs")                               \
  X(kRaceCtasSame, "race between CTAs, same value")               \
  X(kHazard, "hazard within a warp")                              \
  X(kLanesDiffer, "lanes store different values")                 \
  X(kUninitialisedBranch, "branch or predicate on uninitialised") \
  X(kUninitialisedAddress, "address uninitialised")               \
  X(kUninitialisedShuffle, "shuffle by uninitialised")            \
  X(kUninitialisedLoad, "load of uninitialised")                  \
  X(kDiverged, "not converged")                                   \
  X(kBarriersDiffer, "barriers differ")                           \
  X(kNotWaitedFor, "not waited for")                              \
  X(kEndless, "does not end")

enum Kind : s32 {
#define PTX_KIND(name, text) name,
  PTX_KINDS(PTX_KIND)
#undef PTX_KIND
};

struct Finding {  // as program.py reads it
  s32 kind, pc, other_pc, cta, warp, lane, shared, unused;
  u64 address, count;
};

class Findings {
 public:
  void add(Finding finding) {
    Finding& first = found_[{finding.kind, finding.pc, finding.other_pc}];
    if (!first.count) first = finding;
    ++first.count;
  }
  int take(Finding* out, int limit) {
    int count = 0;
    for (const auto& entry : found_)
      if (count < limit) out[count++] = entry.second;
    found_.clear();
    return count;
  }

 private:
  std::map<std::tuple<s32, s32, s32>, Finding> found_;
};

// Zeros that the system hands out page by page as they are used.
template <class T>
class Zeros {
 public:
  explicit Zeros(size_t count = 0) : data_(static_cast<T*>(std::calloc(count + 1, sizeof(T)))) {}
  T& operator[](size_t i) { return data_.get()[i]; }
  T* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// An era begins with each CTA, and with each of its barriers. As CTAs run one after another, its number, which goes on
// through the life of the process, tells the launch, the CTA and the barrier. Steps are a CTA's instructions.
struct Clock {
  u32 launch = 1, cta = 1, era = 1;  // the era in which the launch and the CTA began, and the present one
  u32 step = 0;
  void begin_launch() { launch = cta = ++era; }
  void begin_cta() { cta = ++era, step = 0; }
};

struct Who {
  s32 pc;
  int warp, lane;
  u32 synchronised;  // the step of the warp's last bar.warp.sync
};

// Who wrote and read a granule of memory last.
struct Record {
  u32 write_era, write_step, writers;  // writers and readers: warps, in that era
  s32 write_pc;
  u32 read_era, read_step, readers, read_lanes;
  s32 read_pc;
  u32 read_before;  // an era of another CTA that read it
  u8 write_warp, write_lane, atomic, read_warp;
};

struct Region {
  u64 base, size;  // the allocation
  u64 low, high;   // what the tensors of a launch cover of it
  u8* bytes;
  u32 shift;        // 1 << shift bytes have a record of their own
  Zeros<u8> taint;  // nonzero: nobody has written this byte
  Zeros<Record> records;

  Region(u64 start, u64 length, u32 piece, u8* memory, bool tainted)
      : base(start),
        size(length),
        low(start),
        high(start + length),
        bytes(memory),
        shift(piece == 8 ? 3 : piece / 2),  // of 1, 2, 4
        taint(length),
        records(length / piece + 1) {
    std::memset(taint.data(), tainted, length);
  }
  bool has(u64 address, u64 length) const { return address >= low && address < high && length <= high - address; }
};

// Global memory: regions in an arena, with room between them that belongs to nobody.
class Arena {
 public:
  explicit Arena(u64 size);
  u64 base() const { return base_; }
  bool add(u64 base, u64 size, u32 granule, bool tainted);  // false: not within the arena, or too many
  void clear();
  Region* at(u64 address) {  // the region that an address belongs to, or nullptr
    const u64 offset = address - base_;
    return offset < size_ ? regions_[region_of_[offset / kStep]].get() : nullptr;
  }

 private:
  static constexpr u64 kStep = 16, kPage = 4096;
  void mark(const Region& region, u16 number);
  u64 size_;
  Zeros<u8> memory_;
  u8* first_;             // of a page
  u64 base_;              // its address
  Zeros<u16> region_of_;  // by steps of the arena; 0 is none
  std::vector<std::unique_ptr<Region>> regions_;
};

struct Place {
  u8* bytes = nullptr;  // nullptr: not to be accessed, as was reported
  u8* taint = nullptr;
  bool tainted(u32 size) const {
    u8 any = 0;
    for (u32 k = 0; k < size; ++k) any |= taint[k];
    return any;
  }
};

enum class Access { kRead, kWrite, kAtomic };

// What a CTA sees: the arena, its shared memory, and the clock that orders its accesses.
class Memory {
 public:
  static constexpr u64 kSharedBase = 1024;
  Memory(Arena& arena, Findings& findings, Clock& clock, u32 shared_size, u32 shared_granule, bool races);

  void begin_cta(s32 number);  // shared memory is nobody's again
  void report(Kind kind, const Who& who, s32 other_pc = -1, u64 address = 0, bool shared = false);
  // Reports writes of shared memory after a step: what began there still reads it.
  void expect_unwritten(const Who& who, u64 address, u32 size, u32 step);
  // Where one lane's access goes; `value` is what it writes, where that is known beforehand.
  Place at(const Who& who, bool shared, u64 address, u32 size, Access access, const u8* value = nullptr);

 private:
  struct Use;  // one access to a granule
  void compare(Record& record, const Use& use);
  void compare_with_writes(const Record& record, const Use& use);
  void compare_with_reads(const Record& record, const Use& use);

  Arena& arena_;
  Findings& findings_;
  Clock& clock_;
  std::vector<u8> shared_bytes_;
  Region shared_;
  bool races_;
  s32 cta_ = 0;
};

}  // namespace ptx
