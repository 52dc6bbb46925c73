#include "memory.h"

#include <algorithm>

namespace ptx {

// The arena -----------------------------------------------------------------------------------------------------------

Arena::Arena(u64 size) : size_(size), memory_(size + kPage), region_of_(size / kStep + 1) {
  const u64 address = reinterpret_cast<u64>(memory_.data());
  base_ = (address + kPage - 1) / kPage * kPage;
  first_ = memory_.data() + (base_ - address);
  regions_.emplace_back();
}

void Arena::mark(const Region& region, u16 number) {
  const u64 first = (region.base - base_) / kStep, last = (region.base + region.size - 1 - base_) / kStep;
  for (u64 step = first; step <= last; ++step) region_of_[step] = number;
}

bool Arena::add(u64 base, u64 size, u32 granule, bool tainted) {
  const u64 offset = base - base_;
  if (!size || offset > size_ || size > size_ - offset || regions_.size() > 0xffff) return false;
  regions_.push_back(std::make_unique<Region>(base, size, granule, first_ + offset, tainted));
  mark(*regions_.back(), static_cast<u16>(regions_.size() - 1));
  return true;
}

void Arena::clear() {
  for (const auto& region : regions_)
    if (region) mark(*region, 0);
  regions_.resize(1);
}

// Accesses ------------------------------------------------------------------------------------------------------------

Memory::Memory(Arena& arena, Findings& findings, Clock& clock, u32 shared_size, u32 shared_granule, bool races)
    : arena_(arena),
      findings_(findings),
      clock_(clock),
      shared_bytes_(shared_size + 1),
      shared_(kSharedBase, shared_size, shared_granule, shared_bytes_.data(), true),
      races_(races) {}

void Memory::begin_cta(s32 number) {
  cta_ = number;
  std::fill(shared_bytes_.begin(), shared_bytes_.end(), u8{0xcd});
  std::memset(shared_.taint.data(), 1, shared_.size);
}

void Memory::report(Kind kind, const Who& who, s32 other_pc, u64 address, bool shared) {
  findings_.add({kind, who.pc, other_pc, cta_, who.warp, who.lane, shared, 0, address, 0});
}

struct Memory::Use {
  const Who& who;
  bool shared;
  u64 address;
  Access access;
  u32 first;                // the first era whose accesses can race with this one
  const u8 *value, *bytes;  // what is written, if that is known, over what
  u32 size;
  bool same() const { return value && !std::memcmp(value, bytes, size); }
};

Place Memory::at(const Who& who, bool shared, u64 address, u32 size, Access access, const u8* value) {
  const u32 alignment = size & (0 - size);
  if (address & (alignment - 1)) {
    report(kMisaligned, who, -1, address, shared);
    return {};
  }
  Region* const region = shared ? &shared_ : arena_.at(address);
  if (!region || !region->has(address, size)) {
    report(kOutOfBounds, who, -1, address, shared);
    return {};
  }
  const u64 offset = address - region->base;
  u8* const bytes = region->bytes + offset;
  if (races_) {
    const u32 piece = std::min(1u << region->shift, size);
    Use use{who, shared, address, access, shared ? clock_.cta : clock_.launch, value, bytes, piece};
    Record* record = region->records.data() + (offset >> region->shift);
    for (u32 k = 0; k < size; k += piece, use.value += value ? piece : 0, use.bytes += piece) compare(*record++, use);
  }
  return {bytes, region->taint.data() + offset};
}

// Races: the present access against the last ones to the same granule -------------------------------------------------

inline void Memory::compare(Record& r, const Use& use) {
  // Nothing races across a barrier of the CTA, or with what is no longer there.
  const auto ordered = [&](u32 era) { return era < use.first || (era >= clock_.cta && era != clock_.era); };
  if (!ordered(r.write_era)) compare_with_writes(r, use);
  const Who& who = use.who;
  const u32 warp = 1u << who.warp;
  if (use.access != Access::kRead) {
    if (!ordered(r.read_era) || r.read_before >= use.first) compare_with_reads(r, use);
    const bool first = r.write_era != clock_.era;
    r.writers = first ? warp : r.writers | warp;
    r.atomic = use.access == Access::kAtomic && (first || r.atomic);
    r.write_era = clock_.era, r.write_step = clock_.step, r.write_pc = who.pc;
    r.write_warp = static_cast<u8>(who.warp), r.write_lane = static_cast<u8>(who.lane);
    return;
  }
  if (r.read_era != clock_.era) {
    if (r.read_era < clock_.cta) r.read_before = r.read_era;
    r.read_era = clock_.era, r.readers = r.read_lanes = 0;
  }
  if (r.read_warp != who.warp || r.read_step < who.synchronised) r.read_lanes = 0;
  r.readers |= warp, r.read_lanes |= 1u << who.lane;
  r.read_step = clock_.step, r.read_pc = who.pc, r.read_warp = static_cast<u8>(who.warp);
}

void Memory::compare_with_writes(const Record& r, const Use& use) {
  const Who& who = use.who;
  if (use.access == Access::kAtomic && r.atomic) return;
  const auto found = [&](Kind kind) { report(kind, who, r.write_pc, use.address, use.shared); };
  if (r.write_era < clock_.cta) return found(use.same() ? kRaceCtasSame : kRaceCtas);
  if (r.writers & ~(1u << who.warp)) return found(use.same() ? kRaceSame : kRace);
  if (r.write_warp != who.warp || r.write_lane == who.lane || r.write_step < who.synchronised || use.same()) return;
  if (r.write_step != clock_.step) return found(kHazard);
  if (use.access != Access::kRead) found(kLanesDiffer);
}

void Memory::compare_with_reads(const Record& r, const Use& use) {
  const Who& who = use.who;
  const auto found = [&](Kind kind) { report(kind, who, r.read_pc, use.address, use.shared); };
  if (r.read_era < clock_.cta || r.read_before >= use.first) return found(kRaceCtas);
  if (r.readers & ~(1u << who.warp)) return found(kRace);
  const bool ordered = r.read_warp != who.warp || r.read_step < who.synchronised || r.read_step == clock_.step;
  if (!ordered && r.read_lanes & ~(1u << who.lane) && !use.same()) found(kHazard);
}

void Memory::expect_unwritten(const Who& who, u64 address, u32 size, u32 step) {
  if (!races_ || !shared_.has(address, size)) return;
  for (u64 k = address - shared_.base; k < address - shared_.base + size; k += 1u << shared_.shift) {
    const Record& r = shared_.records[k >> shared_.shift];
    if (r.write_era < clock_.cta || r.write_step <= step) continue;
    report(r.write_warp == who.warp ? kHazard : kRace, who, r.write_pc, address, true);
  }
}

}  // namespace ptx
