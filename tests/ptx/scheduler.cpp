// Runs a launch: CTAs one after another, their warps in turns, both in an order that the seed decides.
#include <algorithm>
#include <numeric>
#include <utility>

#include "warp.h"

namespace ptx {

namespace {

struct Random {
  u64 state;
  explicit Random(u64 seed) : state(seed * 0x9e3779b97f4a7c15 + 0x1234567) {}
  u32 below(u32 limit) {  // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<u32>(state >> 32) % limit;
  }
};

struct Grid {
  u32 x, y, z;
};

constexpr const char* kSpecialRegisters =  // in the first slots, in this order
    "%tid.x %tid.y %tid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y %nctaid.z %ntid.x %ntid.y %ntid.z";

void set_special_registers(Warp& warp, u32 number, Grid grid, u32 num_warps) {
  const u32 values[4][3] = {{0, 0, 0},  // threads are numbered below
                            {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y},
                            {grid.x, grid.y, grid.z},
                            {num_warps * kLanes, 1, 1}};
  for (s32 slot = 0; slot < 12; ++slot) warp.registers.fill<u32>(slot, values[slot / 3][slot % 3]);
  Lanes<u32> threads;
  for (int lane = 0; lane < kLanes; ++lane) threads[lane] = warp.id * kLanes + lane;
  warp.registers.set(0, threads, kAll, 0);
}

Findings findings;
Clock clock;
u64 executed = 0;
auto arena = std::make_unique<Arena>(0);

u8* taint_of(u64 address, u64 size) {  // nullptr: not all of it is of one region
  Region* const region = arena->at(address);
  const bool within = region && size <= region->base + region->size - address;
  return within ? region->taint.data() + (address - region->base) : nullptr;
}

// One instruction of the lanes with the lowest pc.
void step(Cta& cta, Warp& warp, const Instruction* code) {
  while (warp.choose_path()) {
  }
  const Instruction& i = code[warp.pc];
  warp.next = warp.pc + 1;
  ++cta.clock.step, ++executed;
  Mask mask = warp.mask;
  if (i.guard >= 0) {
    cta.expect_initialised(kUninitialisedBranch, warp, i.guard, mask);
    const Mask holds = warp.registers.lanes_where(i.guard);
    mask &= i.negated ? ~holds : holds;
  }
  if (mask) i.execute(cta, warp, i, mask);
  warp.pc = warp.next;
  if (!warp.ended() || warp.under_way() < 0) return;
  warp.pc = warp.under_way();
  cta.report(kNotWaitedFor, warp);
}

// All warps have come, or ended: the barrier opens.
void open_barrier(Cta& cta) {
  const auto waits = [](const Warp& warp) { return warp.waits(); };
  const s32 first = std::find_if(cta.warps.begin(), cta.warps.end(), waits)->barrier;
  for (const Warp& warp : cta.warps)
    if (warp.barrier != first) cta.memory.report(kBarriersDiffer, {first, warp.id, 0, 0}, warp.barrier);
  ++cta.clock.era;
  for (Warp& warp : cta.warps) warp.barrier = -1;
}

// False: it does not end.
bool run_cta(Cta& cta, const Instruction* code, Random& random, u64 limit) {
  const u64 last = executed + limit;
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    bool waiting = false;
    for (Warp& warp : cta.warps) {
      if (!warp.ended() && !warp.waits()) ready.push_back(&warp);
      waiting |= warp.waits();
    }
    if (ready.empty() && !waiting) return true;
    if (ready.empty()) {
      open_barrier(cta);
      continue;
    }
    Warp& warp = *ready[random.below(static_cast<u32>(ready.size()))];
    const u32 turn = random.below(4) ? 1 + random.below(64) : 1 << 20;
    for (u32 k = 0; k < turn && executed < last && !warp.ended() && !warp.waits(); ++k) step(cta, warp, code);
    if (executed >= last && !warp.ended()) {
      cta.report(kEndless, warp);
      return false;
    }
  }
}

}  // namespace

// What program.py calls -----------------------------------------------------------------------------------------------

#pragma GCC visibility push(default)
extern "C" {

struct Launch {  // program.py writes it, in this order
  const Encoded* code;
  const s32* operands;
  const u8* parameters;
  const s32* constant_slots;
  const u64* constant_values;
  const u8* constant_wide;
  u64 seed, limit;
  u32 code_length, num_constants, units, num_warps, grid_x, grid_y, grid_z, shared_size, shared_granule, flags;
};

const char* instruction_names(int operation) {
  return operation < kNumInstructions ? kInstructions[operation].names : nullptr;
}
const char* instruction_operands(int operation) { return kInstructions[operation].operation.operands; }
const char* kind_name(int kind) {
  static const char* const names[] = {
#define PTX_KIND(name, text) text,
      PTX_KINDS(PTX_KIND)
#undef PTX_KIND
          nullptr};
  return names[kind];
}
u64 shared_base() { return Memory::kSharedBase; }
const char* special_registers() { return kSpecialRegisters; }

u64 arena_init(u64 size) {
  arena = std::make_unique<Arena>(size);
  return arena->base();
}
bool region_add(u64 base, u64 size, u32 granule, bool tainted) { return arena->add(base, size, granule, tainted); }
void regions_clear() { arena->clear(); }
void region_bounds(u64 base, u64 low, u64 high) {
  if (Region* region = arena->at(base)) region->low = low, region->high = high;
}
void set_taint(u64 address, u64 size, bool tainted) {
  if (u8* first = taint_of(address, size)) std::memset(first, tainted, size);
}
void get_taint(u64 address, u64 size, u8* out) {
  if (const u8* first = taint_of(address, size)) std::memcpy(out, first, size);
}
u64 count_taint(u64 address, u64 size) {
  const u8* const first = taint_of(address, size);
  return first ? size - std::count(first, first + size, 0) : 0;
}

u64 take_executed() { return std::exchange(executed, 0); }
int take_reports(Finding* out, int limit) { return findings.take(out, limit); }

bool launch(const Launch* l) {  // false: it does not end
  std::vector<Instruction> code(l->code_length);
  for (u32 k = 0; k < l->code_length; ++k) {
    const Encoded& encoded = l->code[k];
    code[k] = {encoded, kInstructions[encoded.operation].operation.execute, l->operands + encoded.operands};
  }
  Registers initial(l->units);
  for (u32 k = 0; k < l->num_constants; ++k) {
    const s32 slot = l->constant_slots[k];
    const u64 value = l->constant_values[k];
    l->constant_wide[k] ? initial.fill<u64>(slot, value) : initial.fill<u32>(slot, static_cast<u32>(value));
  }
  const Grid grid{l->grid_x, l->grid_y, l->grid_z};
  Random random(l->seed);
  std::vector<u32> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[random.below(static_cast<u32>(k))]);

  clock.begin_launch();
  const bool races = l->flags & kRaces;
  Cta cta{{*arena, findings, clock, l->shared_size, l->shared_granule, races}, clock, l->parameters, l->flags};
  for (const u32 number : order) {
    clock.begin_cta();
    cta.memory.begin_cta(static_cast<s32>(number));
    cta.warps.clear();
    for (u32 id = 0; id < l->num_warps; ++id) {
      cta.warps.emplace_back(id, initial);
      set_special_registers(cta.warps.back(), number, grid, l->num_warps);
    }
    if (!run_cta(cta, code.data(), random, l->limit)) return false;
  }
  return true;
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace ptx
