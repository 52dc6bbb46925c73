#include "warp.h"

#include <algorithm>

namespace ptx {

bool Warp::choose_path() {
  const auto lowest = std::min_element(others.begin(), others.end(), [](Path a, Path b) { return a.pc < b.pc; });
  if (lowest == others.end() || lowest->pc > pc) return false;
  if (lowest->pc == pc) {
    mask |= lowest->mask;
    *lowest = others.back();
    others.pop_back();
  } else {
    std::swap(pc, lowest->pc);
    std::swap(mask, lowest->mask);
  }
  return true;
}

void Warp::branch(s32 target, Mask taken) {
  if (const Mask stay = mask & ~taken) others.push_back({pc + 1, stay});
  mask = taken, next = target;
}

void Warp::end(Mask lanes) {
  alive &= ~lanes, mask &= ~lanes;
  if (mask || others.empty()) return;
  next = others.back().pc, mask = others.back().mask;
  others.pop_back();
}

template <class T>
static s32 first_of(const Groups<T>& groups) {
  for (const auto& group : groups.committed)
    if (!group.empty()) return group.front().pc;
  return groups.open.empty() ? -1 : groups.open.front().pc;
}

s32 Warp::under_way() const { return std::max(first_of(copies), first_of(products)); }

}  // namespace ptx
