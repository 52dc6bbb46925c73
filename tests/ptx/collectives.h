// Instructions in which the lanes of a warp read each other's registers.
#pragma once

#include "warp.h"

namespace ptx {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// The lane that a lane reads, itself where that one is out of its segment: b is the distance or lane, c the clamp and,
// in bits 8 to 12, the segments' mask.
template <Shuffle mode>
inline int shuffle_source(int lane, u32 b, u32 c) {
  const int segment = c >> 8 & 31, distance = b & 31;
  const int last = (lane & segment) | (c & 31 & ~segment);  // for kUp, the first
  int source = lane ^ distance;
  if (mode == Shuffle::kUp) source = lane - distance;
  if (mode == Shuffle::kDown) source = lane + distance;
  if (mode == Shuffle::kIndex) source = (lane & segment) | (distance & ~segment);
  return (mode == Shuffle::kUp ? source >= last : source <= last) ? source : lane;
}

template <Shuffle mode>
void shuffle(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_whole(warp, mask, i.operand[4]);
  Registers& registers = warp.registers;
  for (int k : {2, 3}) cta.expect_initialised(kUninitialisedShuffle, warp, i.operand[k], mask);
  const auto a = registers.get<u32>(i.operand[1]), b = registers.get<u32>(i.operand[2]);
  const auto c = registers.get<u32>(i.operand[3]);
  const Mask a_taint = registers.taint(i.operand[1]);
  Lanes<u32> d;
  Mask tainted = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int source = shuffle_source<mode>(lane, b[lane], c[lane]);
    d[lane] = a[source];
    tainted |= (a_taint >> source & 1) << lane;
  }
  registers.set(i.operand[0], d, mask, tainted);
}

template <auto f>
struct Redux;
template <class T, T (*f)(T, T)>
struct Redux<f> {
  static void execute(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
    cta.expect_whole(warp, mask, i.operand[2]);
    const auto a = warp.registers.get<T>(i.operand[1]);
    T sum = from_cell<T>(a[0]);
    for (int lane = 1; lane < kLanes; ++lane) sum = f(sum, from_cell<T>(a[lane]));
    Lanes<T> d;
    d.fill(to_cell<T>(sum));
    warp.registers.set(i.operand[0], d, mask, warp.registers.taint(i.operand[1]) ? kAll : 0);
  }
};

template <auto f>
constexpr Operation redux{&Redux<f>::execute, "4=44"};

}  // namespace ptx
