// Instructions that decide what runs next.
#pragma once

#include "warp.h"

namespace ptx {

inline void branch(Cta&, Warp& warp, const Instruction& i, Mask mask) {
  warp.branch(static_cast<s32>(i.offset), mask);
}

inline void end(Cta&, Warp& warp, const Instruction&, Mask mask) { warp.end(mask); }

inline void barrier(Cta& cta, Warp& warp, const Instruction&, Mask mask) {
  if (mask != warp.alive || !warp.others.empty()) cta.report(kDiverged, warp, first_lane(~mask));
  warp.barrier = warp.pc;
}

inline void barrier_of_warp(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_whole(warp, mask, i.operand[0]);
  warp.synchronised = cta.clock.step;
}

inline void nothing(Cta&, Warp&, const Instruction&, Mask) {}

}  // namespace ptx
