// Instructions that access memory.
#pragma once

#include "warp.h"

namespace ptx {

void load_parameter(Cta&, Warp&, const Instruction&, Mask);
void load(Cta&, Warp&, const Instruction&, Mask);
void store(Cta&, Warp&, const Instruction&, Mask);
void load_matrix(Cta&, Warp&, const Instruction&, Mask);
void store_matrix(Cta&, Warp&, const Instruction&, Mask);
void copy_async(Cta&, Warp&, const Instruction&, Mask);
void commit_copies(Cta&, Warp&, const Instruction&, Mask);
void wait_for_copies(Cta&, Warp&, const Instruction&, Mask);

// Where the lanes access memory: the register's addresses and the offset, in 32 bits in shared memory.
std::array<u64, kLanes> addresses(const Warp& warp, s32 slot, bool shared, s64 offset);

template <class Body>
void each_lane(Mask mask, Body body) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) body(lane);
}

// red and atom: memory = f(memory, value), and what was there. Operands: [result,] value, address.
template <auto f, bool returns>
struct Atomic;
template <class T, T (*f)(T, T), bool returns>
struct Atomic<f, returns> {
  static void execute(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
    const s32* const operand = i.operand + returns;
    const auto values = warp.registers.get<T>(operand[0]);
    const Mask values_taint = warp.registers.taint(operand[0]);
    cta.expect_initialised(kUninitialisedAddress, warp, operand[1], mask, i.shared);
    const auto address = addresses(warp, operand[1], i.shared, i.offset);
    Lanes<T> before{};
    Mask tainted = 0;
    each_lane(mask, [&](int lane) {
      const Place place = cta.memory.at(Cta::who(warp, lane), i.shared, address[lane], sizeof(T), Access::kAtomic);
      if (!place.bytes) return;
      T old;
      std::memcpy(&old, place.bytes, sizeof old);
      const T now = f(old, from_cell<T>(values[lane]));
      std::memcpy(place.bytes, &now, sizeof now);
      before[lane] = to_cell<T>(old);
      const bool bad = place.tainted(sizeof(T)) || values_taint >> lane & 1;
      std::memset(place.taint, bad, sizeof(T));
      tainted |= Mask{bad} << lane;
    });
    if (returns) warp.registers.set(i.operand[0], before, mask, tainted);
  }
};

template <auto f, bool returns>
constexpr Operation atomic{&Atomic<f, returns>::execute, ""};

}  // namespace ptx
