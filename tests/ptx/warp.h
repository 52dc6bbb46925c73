// A warp of 32 lanes in lockstep: its registers, the paths on which its lanes have diverged, what it waits for.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace ptx {

struct Cta;
struct Warp;
struct Instruction;
using Handler = void (*)(Cta&, Warp&, const Instruction&, Mask);

struct Encoded {       // as program.py has it, in this order
  s32 operation;       // of the table in instructions.cpp
  s32 guard, negated;  // the predicate's register, or -1
  s32 operands;        // where its registers begin in the program's list: results first
  s32 count;           // elements of a vector, matrices of 8 x 8, columns of a wgmma
  s32 width, cell;     // bytes of an element in memory, in a register
  s32 shared, is_signed, option;
  s64 offset, other_offset;  // of addresses; the target of a branch; groups that may be under way
};

struct Instruction : Encoded {
  Handler execute;
  const s32* operand;
};

template <class T>
using Lanes = std::array<Cell<T>, kLanes>;

// In units of 32 lanes of 4 bytes; a register of 64 bits is two of them, lane after lane. A tainted lane's value comes
// from memory or a register that nobody has written.
class Registers {
 public:
  explicit Registers(size_t units) : units_(units), taint_(units, kAll) {
    std::memset(at(0), 0xcd, units * sizeof(Unit));
  }
  template <class T>
  Lanes<T> get(s32 slot) const {
    Lanes<T> cells;
    std::memcpy(cells.data(), at(slot), sizeof cells);
    return cells;
  }
  template <class C>
  void set(s32 slot, const std::array<C, kLanes>& cells, Mask mask, Mask tainted) {
    taint_[slot] = (taint_[slot] & ~mask) | (tainted & mask);
    if (mask == kAll) {
      std::memcpy(at(slot), cells.data(), sizeof cells);
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) std::memcpy(at(slot) + lane * sizeof(C), &cells[lane], sizeof(C));
  }
  template <class T>
  void fill(s32 slot, T value) {
    Lanes<T> cells;
    cells.fill(to_cell<T>(value));
    set(slot, cells, kAll, 0);
  }
  Mask lanes_where(s32 predicate) const {
    const auto cells = get<bool>(predicate);
    Mask lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= cells[lane] << lane;
    return lanes;
  }
  Mask taint(s32 slot) const { return taint_[slot]; }
  void set_taint(s32 slot, Mask tainted) { taint_[slot] = tainted; }

 private:
  struct alignas(64) Unit {
    u8 bytes[4 * kLanes];
  };
  u8* at(s32 slot) { return reinterpret_cast<u8*>(units_.data()) + slot * sizeof(Unit); }
  const u8* at(s32 slot) const { return reinterpret_cast<const u8*>(units_.data()) + slot * sizeof(Unit); }
  std::vector<Unit> units_;
  std::vector<Mask> taint_;
};

struct Copy {  // a lane's cp.async under way
  s32 pc;
  int lane;
  u64 to;
  u32 size;
  u8 bytes[16], taint[16];
};

struct Product {  // a wgmma under way
  const Instruction* instruction;
  s32 pc;
  u32 step;  // at which it was issued
  void (*finish)(Cta&, Warp&, const Product&);
  Mask adds;        // lanes that keep what the accumulators hold
  Lanes<u32> a[4];  // A, if it comes from registers
  Mask a_taint[4];
  u64 a_place, b_place;  // descriptors of what comes from shared memory
};

template <class T>
struct Groups {  // what was issued since the last commit, and the groups committed before, oldest first
  std::vector<T> open;
  std::deque<std::vector<T>> committed;
  void commit() { committed.push_back(std::move(open)), open.clear(); }
};

struct Path {
  s32 pc;
  Mask mask;
};

struct Warp {
  Warp(int number, const Registers& initial) : id(number), registers(initial) {}

  int id;
  Registers registers;
  s32 pc = 0, next = 0;            // the present instruction, and the one after it
  Mask mask = kAll, alive = kAll;  // lanes that run at pc, lanes that have not ended
  std::vector<Path> others;        // lanes that wait to run elsewhere
  s32 barrier = -1;                // the instruction at which it waits for other warps
  u32 synchronised = 0;            // the step of the last bar.warp.sync
  Groups<Copy> copies;
  Groups<Product> products;
  std::map<s32, Mask> accumulators;  // that a wgmma writes: the taint that they had, as until its end they are tainted

  bool ended() const { return !alive; }
  bool waits() const { return barrier >= 0; }
  bool choose_path();  // the lowest pc runs, and paths that meet are one again; true if another runs now
  void branch(s32 target, Mask taken);
  void end(Mask lanes);
  s32 under_way() const;  // an instruction whose copy or product nobody has waited for, or -1
};

enum Flags : u32 { kRaces = 1, kTruncate = 2, kInexact = 4, kLoads = 8 };  // bits 8 to 11: guard bits of kTruncate

struct Cta {
  Memory memory;
  Clock& clock;
  const u8* parameters;
  u32 flags;
  std::vector<Warp> warps{};

  static Who who(const Warp& warp, int lane) { return {warp.pc, warp.id, lane, warp.synchronised}; }
  void report(Kind kind, const Warp& warp, int lane = 0, u64 address = 0, bool shared = false) {
    memory.report(kind, who(warp, lane), -1, address, shared);
  }
  // Reports what a register's uninitialised lanes would decide.
  void expect_initialised(Kind kind, const Warp& warp, s32 slot, Mask mask, bool shared = false) {
    if (const Mask bad = warp.registers.taint(slot) & mask) report(kind, warp, first_lane(bad), 0, shared);
  }
  // Instructions of a whole warp: all lanes are there, and are its members, where an operand names those.
  void expect_whole(const Warp& warp, Mask mask, s32 members = -1) {
    if (members >= 0) mask &= warp.registers.get<u32>(members)[0];
    if (mask != kAll || !warp.others.empty()) report(kDiverged, warp, first_lane(~mask));
  }
};

// How an instruction runs, and a letter for each operand, results = sources: 2, 4 or 8 bytes, p a predicate; empty
// where encoding.py knows the form.
struct Operation {
  Handler execute;
  const char* operands;
};

struct Entry {
  const char* names;  // of PTX, apart by spaces
  Operation operation;
};

extern const Entry kInstructions[];
extern const int kNumInstructions;

}  // namespace ptx
