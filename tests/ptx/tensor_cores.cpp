#include "tensor_cores.h"

#include <algorithm>

namespace ptx {

namespace {

constexpr int kDepth = 16;  // of every product here
using Row = std::array<f64, kDepth>;

f64 exponent_cut(f64 x, int unit) {  // toward zero, to a multiple of 2^unit
  return std::ldexp(std::trunc(std::ldexp(x, -unit)), unit);
}

// As tensor cores are known to add: each term is cut to 24 bits and some guard bits, counted from the first bit of the
// largest one; their exact sum is cut to 24 bits.
f64 truncated_sum(const f64* terms, int count, int guard_bits) {
  int top = -2000;
  f64 sum = 0;
  for (int k = 0; k < count; ++k) {
    int exponent;
    sum += terms[k];
    if (!std::isfinite(sum)) return sum;
    if (std::frexp(terms[k], &exponent) != 0 && exponent > top) top = exponent;
  }
  if (top == -2000) return sum;
  sum = 0;
  for (int k = 0; k < count; ++k) sum += exponent_cut(terms[k], top - 24 - guard_bits);
  int exponent;
  std::frexp(sum, &exponent);
  return exponent_cut(sum, exponent - 24);
}

f32 dot(const Row& a, const Row& b, f32 c, u32 flags) {
  f64 sum = c;
  if (!(flags & kTruncate)) {
    for (int k = 0; k < kDepth; ++k) sum += a[k] * b[k];
    return canonical(static_cast<f32>(sum));
  }
  for (int half = 0; half < kDepth; half += 8) {  // eight products at a time
    f64 terms[9];
    for (int k = 0; k < 8; ++k) terms[k] = a[half + k] * b[half + k];
    terms[8] = sum;
    sum = truncated_sum(terms, 9, static_cast<int>(flags >> 8 & 15));
  }
  return canonical(static_cast<f32>(sum));
}

template <class Half>
void unpack(u32 pair, f64* to) {
  to[0] = to_f32(Half{static_cast<u16>(pair)});
  to[1] = to_f32(Half{static_cast<u16>(pair >> 16)});
}

// A warp's 16 rows of A; in its four registers are the rows lane / 4 and 8 below, the columns 2 (lane % 4) and 8
// further.
struct A {
  Row row[16];
  u32 tainted = 0;  // by rows
};

template <class Half>
A rows_of(const Lanes<u32>* cells, const Mask* taint) {
  A a;
  for (int k = 0; k < 4; ++k)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + k % 2 * 8;
      unpack<Half>(cells[k][lane], &a.row[row][lane % 4 * 2 + k / 2 * 8]);
      a.tainted |= (taint[k] >> lane & 1) << row;
    }
  return a;
}

}  // namespace

template <class Half>
void mma(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_whole(warp, mask);
  Registers& registers = warp.registers;
  Lanes<u32> cells[4];
  Mask taint[4];
  for (int k = 0; k < 4; ++k)
    cells[k] = registers.get<u32>(i.operand[4 + k]), taint[k] = registers.taint(i.operand[4 + k]);
  const A a = rows_of<Half>(cells, taint);
  Row b[8];  // by columns
  u32 b_tainted = 0;
  for (int k = 0; k < 2; ++k) {
    const auto pairs = registers.get<u32>(i.operand[8 + k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      unpack<Half>(pairs[lane], &b[lane / 4][lane % 4 * 2 + k * 8]);
      b_tainted |= (registers.taint(i.operand[8 + k]) >> lane & 1) << lane / 4;
    }
  }
  Lanes<u32> d[4];
  Mask d_taint[4];
  for (int k = 0; k < 4; ++k) {
    const auto c = registers.get<u32>(i.operand[10 + k]);
    d_taint[k] = registers.taint(i.operand[10 + k]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
      d[k][lane] = same_bits<u32>(dot(a.row[row], b[column], same_bits<f32>(c[lane]), cta.flags));
      d_taint[k] |= ((a.tainted >> row | b_tainted >> column) & 1) << lane;
    }
  }
  for (int k = 0; k < 4; ++k) registers.set(i.operand[k], d[k], mask, d_taint[k]);
}

template void mma<bf16>(Cta&, Warp&, const Instruction&, Mask);
template void mma<f16>(Cta&, Warp&, const Instruction&, Mask);

// wgmma: what a warp has of it, 16 rows of A and all of B -------------------------------------------------------------

namespace {

// A descriptor of rows of 16 halves: where they start, how far groups of eight are apart, how they are swizzled.
struct Tile {
  explicit Tile(u64 descriptor)
      : start((descriptor & 0x3fff) << 4),
        lead((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzled(descriptor >> 62 ? 8u >> ((descriptor >> 62) - 1) : 1) {}
  u64 start, lead, stride;
  u32 swizzled;  // pieces of 16 bytes that change places within a row of as many: 1, 2, 4, 8

  u64 address(int row, int k) const {
    const u64 within_row = swizzled == 1 ? k / 8 * lead + k % 8 * 2 : k * 2;
    const u64 plain = start + row / 8 * stride + row % 8 * 16 * swizzled + within_row;
    return plain ^ (plain >> 7 & (swizzled - 1)) << 4;
  }
};

template <class Half>
bool read_row(Cta& cta, const Who& who, u32 issued, const Tile& tile, int row, Row& to) {  // true: not all initialised
  bool tainted = false;
  for (int k = 0; k < kDepth; k += 2) {
    cta.memory.expect_unwritten(who, tile.address(row, k), 4, issued);
    const Place place = cta.memory.at(who, true, tile.address(row, k), 4, Access::kRead);
    u32 pair = 0;
    if (place.bytes) std::memcpy(&pair, place.bytes, 4);
    tainted |= !place.bytes || place.tainted(4);
    unpack<Half>(pair, &to[k]);
  }
  return tainted;
}

struct Operands {
  A a;
  std::vector<Row> b;  // by columns
  std::vector<bool> b_tainted;
};

template <class Half>
Operands read(Cta& cta, const Warp& warp, const Product& product) {
  const Instruction& i = *product.instruction;
  Operands operands{{}, std::vector<Row>(i.count), std::vector<bool>(i.count)};
  const auto read_to = [&](u64 place, int row, Row& to) {
    const Who who{product.pc, warp.id, row % kLanes, warp.synchronised};
    return read_row<Half>(cta, who, product.step, Tile(place), row, to);
  };
  if (i.option) operands.a = rows_of<Half>(product.a, product.a_taint);
  for (int row = 0; !i.option && row < 16; ++row)
    operands.a.tainted |= u32{read_to(product.a_place, warp.id % 4 * 16 + row, operands.a.row[row])} << row;
  for (int n = 0; n < i.count; ++n) operands.b_tainted[n] = read_to(product.b_place, n, operands.b[n]);
  return operands;
}

template <class Half>
void finish(Cta& cta, Warp& warp, const Product& product) {
  const Instruction& i = *product.instruction;
  const Operands operands = read<Half>(cta, warp, product);
  for (int j = 0; j < i.count / 2; ++j) {
    auto d = warp.registers.get<u32>(i.operand[j]);
    Mask& tainted = warp.accumulators[i.operand[j]];
    tainted &= product.adds;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
      const f32 c = product.adds >> lane & 1 ? same_bits<f32>(d[lane]) : 0;
      d[lane] = same_bits<u32>(dot(operands.a.row[row], operands.b[column], c, cta.flags));
      tainted |= Mask{operands.a.tainted >> row & 1 || operands.b_tainted[column]} << lane;
    }
    warp.registers.set(i.operand[j], d, kAll, kAll);
  }
}

u64 same_for_all(Cta& cta, const Warp& warp, s32 slot) {  // a descriptor
  cta.expect_initialised(kUninitialisedAddress, warp, slot, kAll, true);
  const auto lanes = warp.registers.get<u64>(slot);
  for (int lane = 1; lane < kLanes; ++lane)
    if (lanes[lane] != lanes[0]) cta.report(kLanesDiffer, warp, lane, lanes[lane], true);
  return lanes[0];
}

}  // namespace

// The operands in shared memory are read twice, now and when the product is waited for: nobody may write them
// meanwhile. The accumulators are nobody's until then.
template <class Half>
void wgmma(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  cta.expect_whole(warp, mask);
  const int accumulators = i.count / 2;
  const s32 *const a = i.operand + accumulators, *const b = a + (i.option ? 4 : 1), adds = b[1];
  Product product{&i, warp.pc, cta.clock.step, finish<Half>, 0, {}, {}, 0, same_for_all(cta, warp, *b)};
  cta.expect_initialised(kUninitialisedBranch, warp, adds, kAll);
  const auto adding = warp.registers.get<bool>(adds);
  for (int lane = 0; lane < kLanes; ++lane) product.adds |= Mask{adding[lane] != 0} << lane;
  if (i.option) {
    for (int k = 0; k < 4; ++k)
      product.a[k] = warp.registers.get<u32>(a[k]), product.a_taint[k] = warp.registers.taint(a[k]);
  } else {
    product.a_place = same_for_all(cta, warp, *a);
  }
  for (int j = 0; j < accumulators; ++j) {
    warp.accumulators.emplace(i.operand[j], warp.registers.taint(i.operand[j]));
    warp.registers.set_taint(i.operand[j], kAll);
  }
  read<Half>(cta, warp, product);
  warp.products.open.push_back(product);
}

template void wgmma<bf16>(Cta&, Warp&, const Instruction&, Mask);
template void wgmma<f16>(Cta&, Warp&, const Instruction&, Mask);

void commit_products(Cta&, Warp& warp, const Instruction&, Mask) { warp.products.commit(); }

void wait_for_products(Cta& cta, Warp& warp, const Instruction& i, Mask) {
  auto& groups = warp.products.committed;
  while (static_cast<s64>(groups.size()) > i.offset) {
    for (const Product& product : groups.front()) product.finish(cta, warp, product);
    groups.pop_front();
  }
  std::map<s32, Mask> under_way;
  const auto keep = [&](const std::vector<Product>& group) {
    for (const Product& product : group)
      for (int j = 0; j < product.instruction->count / 2; ++j) {
        const s32 slot = product.instruction->operand[j];
        under_way[slot] = warp.accumulators[slot];
      }
  };
  std::for_each(groups.begin(), groups.end(), keep);
  keep(warp.products.open);
  for (const auto& [slot, tainted] : warp.accumulators)
    if (!under_way.count(slot)) warp.registers.set_taint(slot, tainted);
  warp.accumulators = std::move(under_way);
}

}  // namespace ptx
