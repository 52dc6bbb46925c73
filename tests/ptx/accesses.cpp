#include "accesses.h"

#include <algorithm>

namespace ptx {

namespace {

constexpr u64 kGarbage = 0xdeadbeefdeadbeef;  // what an access reads that was reported

u64 extended(u64 value, int bytes) {  // the sign
  const int unused = 64 - 8 * bytes;
  return static_cast<u64>(static_cast<s64>(value << unused) >> unused);
}

void put(Lanes<u32>& cells, int lane, u64 value) { cells[lane] = static_cast<u32>(value); }
void put(Lanes<u64>& cells, int lane, u64 value) { cells[lane] = value; }

}  // namespace

std::array<u64, kLanes> addresses(const Warp& warp, s32 slot, bool shared, s64 offset) {
  std::array<u64, kLanes> result;
  if (shared) {
    const auto base = warp.registers.get<u32>(slot);
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = base[lane] + static_cast<u32>(offset);
  } else {
    const auto base = warp.registers.get<u64>(slot);
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = base[lane] + static_cast<u64>(offset);
  }
  return result;
}

void load_parameter(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  u64 value = 0;
  std::memcpy(&value, cta.parameters + i.offset, i.width);
  if (i.is_signed) value = extended(value, i.width);
  const auto set = [&](auto cells) {
    for (int lane = 0; lane < kLanes; ++lane) put(cells, lane, value);
    warp.registers.set(i.operand[0], cells, mask, 0);
  };
  i.cell == 8 ? set(Lanes<u64>{}) : set(Lanes<u32>{});
}

// ld and st: the vector's registers, then the address --------------------------------------------------------------------

template <class Cells>
void load_cells(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const s32 base = i.operand[i.count];
  const auto address = addresses(warp, base, i.shared, i.offset);
  Cells cells[4];
  Mask tainted[4] = {};
  each_lane(mask, [&](int lane) {
    const u32 size = i.width * i.count;
    Place place = cta.memory.at(Cta::who(warp, lane), i.shared, address[lane], size, Access::kRead);
    for (int k = 0; k < i.count; ++k) {
      u64 value = place.bytes ? 0 : kGarbage;
      if (place.bytes) std::memcpy(&value, place.bytes + k * i.width, i.width);
      put(cells[k], lane, i.is_signed ? extended(value, i.width) : value);
      const bool bad = !place.bytes || Place{place.bytes, place.taint + k * i.width}.tainted(i.width);
      tainted[k] |= Mask{bad} << lane;
    }
  });
  const Mask base_taint = warp.registers.taint(base) & mask;
  for (int k = 0; k < i.count; ++k) {
    if (cta.flags & kLoads && tainted[k]) cta.report(kUninitialisedLoad, warp, first_lane(tainted[k]), 0, i.shared);
    warp.registers.set(i.operand[k], cells[k], mask, tainted[k] | base_taint);
  }
}

void load(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_initialised(kUninitialisedAddress, warp, i.operand[i.count], mask, i.shared);
  (i.cell == 8 ? load_cells<Lanes<u64>> : load_cells<Lanes<u32>>)(cta, warp, i, mask);
}

void store(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const s32 base = i.operand[i.count];
  cta.expect_initialised(kUninitialisedAddress, warp, base, mask, i.shared);
  const auto address = addresses(warp, base, i.shared, i.offset);
  const u32 size = i.width * i.count;
  u8 bytes[kLanes][32];
  for (int k = 0; k < i.count; ++k) {
    const auto copy = [&](const auto& cells) {
      each_lane(mask, [&](int lane) { std::memcpy(bytes[lane] + k * i.width, &cells[lane], i.width); });
    };
    i.cell == 8 ? copy(warp.registers.get<u64>(i.operand[k])) : copy(warp.registers.get<u32>(i.operand[k]));
  }
  each_lane(mask, [&](int lane) {
    const Who who = Cta::who(warp, lane);
    const Place place = cta.memory.at(who, i.shared, address[lane], size, Access::kWrite, bytes[lane]);
    if (!place.bytes) return;
    std::memcpy(place.bytes, bytes[lane], size);
    for (int k = 0; k < i.count; ++k)
      std::memset(place.taint + k * i.width, warp.registers.taint(i.operand[k]) >> lane & 1, i.width);
  });
}

// ldmatrix and stmatrix: matrices of 8 x 8 halves. Lane 8 k + r has the address of row r of matrix k; the numbers lie in
// the lanes' registers two by two, row after row.

struct Matrix {
  u16 element[8][8];
  bool tainted[8][8];
};

// The access to the pair of numbers that a lane holds; `value` is what it writes.
static Place pair_of(Cta& cta, const Warp& warp, int lane, u64 row_address, Access access, const u8* value = nullptr) {
  const Who who = Cta::who(warp, lane);
  if (row_address % 16 == 0) return cta.memory.at(who, true, row_address + lane % 4 * 4, 4, access, value);
  cta.memory.report(kMisaligned, who, -1, row_address, true);
  return {};
}

static std::array<u64, kLanes> row_addresses(Cta& cta, const Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_whole(warp, mask);
  cta.expect_initialised(kUninitialisedAddress, warp, i.operand[i.count], kAll >> (kLanes - 8 * i.count), true);
  return addresses(warp, i.operand[i.count], true, i.offset);
}

void load_matrix(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const bool transposed = i.option;
  const auto address = row_addresses(cta, warp, i, mask);
  for (int k = 0; k < i.count; ++k) {
    Matrix m;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const Place place = pair_of(cta, warp, lane, address[8 * k + row], Access::kRead);
      const u16 garbage[2] = {static_cast<u16>(kGarbage), static_cast<u16>(kGarbage)};
      std::memcpy(&m.element[row][column], place.bytes ? place.bytes : reinterpret_cast<const u8*>(garbage), 4);
      for (int j = 0; j < 2; ++j)
        m.tainted[row][column + j] = !place.bytes || Place{nullptr, place.taint + 2 * j}.tainted(2);
    }
    Lanes<u32> d;
    Mask tainted = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const auto at = [&](auto& of, int j) { return transposed ? of[minor + j][major] : of[major][minor + j]; };
      d[lane] = static_cast<u32>(at(m.element, 1)) << 16 | at(m.element, 0);
      tainted |= Mask{at(m.tainted, 0) || at(m.tainted, 1)} << lane;
    }
    warp.registers.set(i.operand[k], d, kAll, tainted);
  }
}

void store_matrix(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const auto address = row_addresses(cta, warp, i, mask);
  for (int k = 0; k < i.count; ++k) {
    const auto values = warp.registers.get<u32>(i.operand[k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      u8 bytes[4];
      std::memcpy(bytes, &values[lane], 4);
      const Place place = pair_of(cta, warp, lane, address[8 * k + lane / 4], Access::kWrite, bytes);
      if (!place.bytes) continue;
      std::memcpy(place.bytes, bytes, 4);
      std::memset(place.taint, warp.registers.taint(i.operand[k]) >> lane & 1, 4);
    }
  }
}

// cp.async: what is copied arrives when it is waited for; until then its bytes are nobody's ------------------------------

// Operands: to, from, how many of the bytes are copied; the rest of them becomes zeros.
void copy_async(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  for (int k = 0; k < 3; ++k) cta.expect_initialised(kUninitialisedAddress, warp, i.operand[k], mask, k == 0);
  const auto to = addresses(warp, i.operand[0], true, i.other_offset);
  const auto from = addresses(warp, i.operand[1], false, i.offset);
  const auto sizes = warp.registers.get<u32>(i.operand[2]);
  const u32 size = i.width;
  each_lane(mask, [&](int lane) {
    const Who who = Cta::who(warp, lane);
    Copy copy{warp.pc, lane, to[lane], size, {}, {}};
    const u32 copied = std::min(sizes[lane], size);
    if (copied && from[lane] % size) cta.memory.report(kMisaligned, who, -1, from[lane], false);
    else if (copied) {
      const Place source = cta.memory.at(who, false, from[lane], copied, Access::kRead);
      if (source.bytes) std::memcpy(copy.bytes, source.bytes, copied);
      source.taint ? std::memcpy(copy.taint, source.taint, copied) : std::memset(copy.taint, 1, copied);
    }
    const Place place = cta.memory.at(who, true, to[lane], size, Access::kWrite);
    if (!place.bytes) return;
    std::memset(place.bytes, 0xff, size);
    std::memset(place.taint, 1, size);
    warp.copies.open.push_back(copy);
  });
}

void commit_copies(Cta&, Warp& warp, const Instruction&, Mask) { warp.copies.commit(); }

void wait_for_copies(Cta& cta, Warp& warp, const Instruction& i, Mask) {
  while (static_cast<s64>(warp.copies.committed.size()) > i.offset) {
    for (const Copy& copy : warp.copies.committed.front()) {
      const Who who{copy.pc, warp.id, copy.lane, warp.synchronised};
      const Place place = cta.memory.at(who, true, copy.to, copy.size, Access::kWrite);
      std::memcpy(place.bytes, copy.bytes, copy.size);
      std::memcpy(place.taint, copy.taint, copy.size);
    }
    warp.copies.committed.pop_front();
  }
}

}  // namespace ptx
