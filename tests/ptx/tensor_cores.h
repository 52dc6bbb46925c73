// Matrix products: mma.sync of a warp, wgmma of a warpgroup.
#pragma once

#include "warp.h"

namespace ptx {

template <class Half>
void mma(Cta&, Warp&, const Instruction&, Mask);  // m16n8k16; operands: D 4, A 4, B 2, C 4

// m64nNk16; operands: D N / 2, A 1 or (option) 4, B, the predicate that D is added to.
template <class Half>
void wgmma(Cta&, Warp&, const Instruction&, Mask);
void commit_products(Cta&, Warp&, const Instruction&, Mask);
void wait_for_products(Cta&, Warp&, const Instruction&, Mask);

}  // namespace ptx
