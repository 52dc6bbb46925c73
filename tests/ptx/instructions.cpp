// The instructions of PTX that run here: their names, which encoding.py reads, and what they do; it refuses others.
#include "accesses.h"
#include "arithmetic.h"
#include "collectives.h"
#include "flow.h"
#include "lanewise.h"
#include "tensor_cores.h"

namespace ptx {

namespace {

// An initialised 0 decides a product of bits, ones or true a sum of them, a NaN any result.
template <class T>
bool is_zero(T a) {
  return !a;
}
template <class T>
bool is_ones(T a) {
  return a == static_cast<T>(~u64{0});
}

template <class T>
T select(T a, T b, bool choice) {
  return choice ? a : b;
}

// As lanewise<select<T>>, but what is not chosen may be uninitialised.
template <class T>
void select_lanes(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const Mask a = warp.registers.taint(i.operand[1]), b = warp.registers.taint(i.operand[2]);
  const Mask choice = warp.registers.lanes_where(i.operand[3]), unknown = warp.registers.taint(i.operand[3]);
  lanewise<select<T>>.execute(cta, warp, i, mask);
  const Mask tainted = unknown | (a & choice) | (b & ~choice), d = warp.registers.taint(i.operand[0]);
  warp.registers.set_taint(i.operand[0], (d & ~mask) | (tainted & mask));
}

// mov of a pair to or from a register twice as wide. Operands: the wide one first when packed, last when unpacked.
template <class Wide, class Part>
void pack(Cta&, Warp& warp, const Instruction& i, Mask mask) {
  const auto low = warp.registers.get<Part>(i.operand[1]), high = warp.registers.get<Part>(i.operand[2]);
  Lanes<Wide> wide;
  for (int lane = 0; lane < kLanes; ++lane)
    wide[lane] = from_cell<Part>(low[lane]) | static_cast<Wide>(high[lane]) << kBits<Part>;
  warp.registers.set(i.operand[0], wide, mask, warp.registers.taint(i.operand[1]) | warp.registers.taint(i.operand[2]));
}
template <class Wide, class Part>
void unpack(Cta&, Warp& warp, const Instruction& i, Mask mask) {
  const auto wide = warp.registers.get<Wide>(i.operand[2]);
  const Mask tainted = warp.registers.taint(i.operand[2]);
  Lanes<Part> low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = static_cast<Part>(wide[lane]);
    high[lane] = static_cast<Part>(wide[lane] >> kBits<Part>);
  }
  warp.registers.set(i.operand[0], low, mask, tainted);
  warp.registers.set(i.operand[1], high, mask, tainted);
}

template <auto f>
void approximate_lanes(Cta& cta, Warp& warp, const Instruction& i, Mask mask) {
  const bool inexact = cta.flags & kInexact;
  (inexact ? lanewise<&Inexact<f>::call> : lanewise<f>).execute(cta, warp, i, mask);
}
template <auto f>
constexpr Operation approximate{approximate_lanes<f>, lanewise<f>.operands};

// clang-format off
#define ORDER(type)                                                                               \
  {"setp.lt." #type, lanewise<lt<type>>}, {"setp.le." #type, lanewise<le<type>>},                 \
  {"setp.gt." #type, lanewise<gt<type>>}, {"setp.ge." #type, lanewise<ge<type>>},                 \
  {"min." #type, lanewise<smaller<type>>}, {"max." #type, lanewise<larger<type>>}

#define ORDER_WITH_NAN(type)                                                                      \
  {"setp.eq." #type, decided<eq<type>, is_nan<type>>},                                            \
  {"setp.ne." #type, decided<ne<type>, is_nan<type>>},                                            \
  {"setp.lt." #type, decided<lt<type>, is_nan<type>>},                                            \
  {"setp.le." #type, decided<le<type>, is_nan<type>>},                                            \
  {"setp.gt." #type, decided<gt<type>, is_nan<type>>},                                            \
  {"setp.ge." #type, decided<ge<type>, is_nan<type>>},                                            \
  {"setp.nan." #type, decided<nan<type>, is_nan<type>>},                                          \
  {"setp.num." #type, decided<negated<type, nan<type>>, is_nan<type>>},                           \
  {"setp.equ." #type, decided<negated<type, ne<type>>, is_nan<type>>},                            \
  {"setp.neu." #type, decided<negated<type, eq<type>>, is_nan<type>>},                            \
  {"setp.ltu." #type, decided<negated<type, ge<type>>, is_nan<type>>},                            \
  {"setp.leu." #type, decided<negated<type, gt<type>>, is_nan<type>>},                            \
  {"setp.gtu." #type, decided<negated<type, le<type>>, is_nan<type>>},                            \
  {"setp.geu." #type, decided<negated<type, lt<type>>, is_nan<type>>}

#define TO_FLOATS(type)                                                                           \
  {"cvt.rn.f32." #type, lanewise<convert_float<f32, type>>},                                      \
  {"cvt.rn.f64." #type, lanewise<convert_float<f64, type>>}
// clang-format on

}  // namespace

const Entry kInstructions[] = {
    // Moves
    {"mov.b16 mov.u16 mov.s16", lanewise<same<u16>>},
    {"mov.b32 mov.u32 mov.s32 mov.f32", lanewise<same<u32>>},
    {"mov.b64 mov.u64 mov.s64 mov.f64", lanewise<same<u64>>},
    {"mov.pred", lanewise<same<bool>>},
    {"selp.b16 selp.u16 selp.s16", {select_lanes<u16>, "2=22p"}},
    {"selp.b32 selp.u32 selp.s32 selp.f32", {select_lanes<u32>, "4=44p"}},
    {"selp.b64 selp.u64 selp.s64 selp.f64", {select_lanes<u64>, "8=88p"}},
    {"pack.b32", {pack<u32, u16>, "4=22"}},
    {"pack.b64", {pack<u64, u32>, "8=44"}},
    {"unpack.b32", {unpack<u32, u16>, "22=4"}},
    {"unpack.b64", {unpack<u64, u32>, "44=8"}},

    // Integers
    {"add.s16 add.u16", lanewise<add<u16>>},
    {"add.s16x2 add.u16x2", lanewise<add_pair>},
    {"add.s32 add.u32", lanewise<add<u32>>},
    {"add.s64 add.u64", lanewise<add<u64>>},
    {"sub.s16 sub.u16", lanewise<sub<u16>>},
    {"sub.s32 sub.u32", lanewise<sub<u32>>},
    {"sub.s64 sub.u64", lanewise<sub<u64>>},
    {"mul.lo.s16 mul.lo.u16", lanewise<mul<u16>>},
    {"mul.lo.s32 mul.lo.u32", lanewise<mul<u32>>},
    {"mul.lo.s64 mul.lo.u64", lanewise<mul<u64>>},
    {"mul.hi.u32", lanewise<mul_hi>},
    {"mul.wide.s16", lanewise<mul_wide<s32, s16>>},
    {"mul.wide.u16", lanewise<mul_wide<u32, u16>>},
    {"mul.wide.s32", lanewise<mul_wide<s64, s32>>},
    {"mul.wide.u32", lanewise<mul_wide<u64, u32>>},
    {"mad.lo.s32 mad.lo.u32", lanewise<mad<u32>>},
    {"mad.lo.s64 mad.lo.u64", lanewise<mad<u64>>},
    {"mad.wide.s32", lanewise<mad_wide<s64, s32>>},
    {"mad.wide.u32", lanewise<mad_wide<u64, u32>>},
    {"neg.s32", lanewise<neg<u32>>},
    {"neg.s64", lanewise<neg<u64>>},
    {"abs.s32", lanewise<absolute<u32>>},
    {"abs.s64", lanewise<absolute<u64>>},
    {"div.s32", lanewise<div<s32>>},
    {"div.u32", lanewise<div<u32>>},
    {"div.s64", lanewise<div<s64>>},
    {"div.u64", lanewise<div<u64>>},
    {"rem.s32", lanewise<rem<s32>>},
    {"rem.u32", lanewise<rem<u32>>},
    {"rem.s64", lanewise<rem<s64>>},
    {"rem.u64", lanewise<rem<u64>>},
    ORDER(s16),
    ORDER(u16),
    ORDER(s32),
    ORDER(u32),
    ORDER(s64),
    ORDER(u64),
    {"setp.eq.b16 setp.eq.s16 setp.eq.u16", lanewise<eq<u16>>},
    {"setp.ne.b16 setp.ne.s16 setp.ne.u16", lanewise<ne<u16>>},
    {"setp.eq.b32 setp.eq.s32 setp.eq.u32", lanewise<eq<u32>>},
    {"setp.ne.b32 setp.ne.s32 setp.ne.u32", lanewise<ne<u32>>},
    {"setp.eq.b64 setp.eq.s64 setp.eq.u64", lanewise<eq<u64>>},
    {"setp.ne.b64 setp.ne.s64 setp.ne.u64", lanewise<ne<u64>>},

    // Bits
    {"and.b16", decided<bits_and<u16>, is_zero<u16>>},
    {"and.b32", decided<bits_and<u32>, is_zero<u32>>},
    {"and.b64", decided<bits_and<u64>, is_zero<u64>>},
    {"and.pred", decided<bits_and<bool>, is_zero<bool>>},
    {"or.b16", decided<bits_or<u16>, is_ones<u16>>},
    {"or.b32", decided<bits_or<u32>, is_ones<u32>>},
    {"or.b64", decided<bits_or<u64>, is_ones<u64>>},
    {"or.pred", decided<bits_or<bool>, is_ones<bool>>},
    {"xor.b16", lanewise<bits_xor<u16>>},
    {"xor.b32", lanewise<bits_xor<u32>>},
    {"xor.b64", lanewise<bits_xor<u64>>},
    {"xor.pred", lanewise<bits_xor<bool>>},
    {"not.b16", lanewise<bits_not<u16>>},
    {"not.b32", lanewise<bits_not<u32>>},
    {"not.b64", lanewise<bits_not<u64>>},
    {"not.pred", lanewise<not_predicate>},
    {"shl.b16", lanewise<shl<u16>>},
    {"shl.b32", lanewise<shl<u32>>},
    {"shl.b64", lanewise<shl<u64>>},
    {"shr.s16", lanewise<shr<s16>>},
    {"shr.u16 shr.b16", lanewise<shr<u16>>},
    {"shr.s32", lanewise<shr<s32>>},
    {"shr.u32 shr.b32", lanewise<shr<u32>>},
    {"shr.s64", lanewise<shr<s64>>},
    {"shr.u64 shr.b64", lanewise<shr<u64>>},
    {"shf.l.wrap.b32", lanewise<funnel_left>},
    {"shf.r.wrap.b32", lanewise<funnel_right>},
    {"bfe.s32", lanewise<extract<s32>>},
    {"bfe.u32", lanewise<extract<u32>>},
    {"bfe.s64", lanewise<extract<s64>>},
    {"bfe.u64", lanewise<extract<u64>>},
    {"prmt.b32", lanewise<permute>},
    {"popc.b32", lanewise<population>},
    {"clz.b32", lanewise<leading_zeros>},

    // Floating point
    {"add.f32 add.rn.f32", decided<fadd<f32>, is_nan<f32>>},
    {"sub.f32 sub.rn.f32", decided<fsub<f32>, is_nan<f32>>},
    {"mul.f32 mul.rn.f32", decided<fmul<f32>, is_nan<f32>>},
    {"div.rn.f32", decided<fdiv<f32>, is_nan<f32>>},
    {"fma.rn.f32", decided<fma<f32>, is_nan<f32>>},
    {"add.ftz.f32 add.rn.ftz.f32", decided<ftz<fadd<f32>>, is_nan<f32>>},
    {"sub.ftz.f32 sub.rn.ftz.f32", decided<ftz<fsub<f32>>, is_nan<f32>>},
    {"mul.ftz.f32 mul.rn.ftz.f32", decided<ftz<fmul<f32>>, is_nan<f32>>},
    {"fma.rn.ftz.f32", decided<ftz<fma<f32>>, is_nan<f32>>},
    {"add.f64 add.rn.f64", decided<fadd<f64>, is_nan<f64>>},
    {"sub.f64 sub.rn.f64", decided<fsub<f64>, is_nan<f64>>},
    {"mul.f64 mul.rn.f64", decided<fmul<f64>, is_nan<f64>>},
    {"div.rn.f64", decided<fdiv<f64>, is_nan<f64>>},
    {"fma.rn.f64", decided<fma<f64>, is_nan<f64>>},
    {"sqrt.rn.f32", lanewise<fsqrt<f32>>},
    {"sqrt.rn.f64", lanewise<fsqrt<f64>>},
    {"rcp.rn.f32", lanewise<rcp>},
    {"div.full.f32", approximate<fdiv<f32>>},
    {"div.full.ftz.f32", approximate<ftz<fdiv<f32>>>},
    {"sqrt.approx.f32", approximate<fsqrt<f32>>},
    {"sqrt.approx.ftz.f32", approximate<ftz<fsqrt<f32>>>},
    {"rcp.approx.f32", approximate<rcp>},
    {"rcp.approx.ftz.f32", approximate<ftz<rcp>>},
    {"rsqrt.approx.f32", approximate<rsqrt>},
    {"rsqrt.approx.ftz.f32", approximate<ftz<rsqrt>>},
    {"ex2.approx.f32", approximate<ex2>},
    {"ex2.approx.ftz.f32", approximate<ftz<ex2>>},
    {"lg2.approx.f32", approximate<lg2>},
    {"lg2.approx.ftz.f32", approximate<ftz<lg2>>},
    {"min.f32", lanewise<fmin<f32>>},
    {"max.f32", lanewise<fmax<f32>>},
    {"min.f64", lanewise<fmin<f64>>},
    {"max.f64", lanewise<fmax<f64>>},
    {"min.NaN.f32", lanewise<or_nan<fmin<f32>>>},
    {"max.NaN.f32", lanewise<or_nan<fmax<f32>>>},
    {"neg.f32", lanewise<fneg<f32>>},
    {"neg.f64", lanewise<fneg<f64>>},
    {"neg.f16", lanewise<fneg<f16>>},
    {"neg.bf16", lanewise<fneg<bf16>>},
    {"neg.f16x2 neg.bf16x2", lanewise<fneg_pair>},
    {"abs.f32", lanewise<fabs<f32>>},
    {"abs.f64", lanewise<fabs<f64>>},
    {"abs.f16", lanewise<fabs<f16>>},
    {"abs.bf16", lanewise<fabs<bf16>>},
    {"abs.f16x2 abs.bf16x2", lanewise<fabs_pair>},
    ORDER_WITH_NAN(f32),
    ORDER_WITH_NAN(f64),
    ORDER_WITH_NAN(f16),
    ORDER_WITH_NAN(bf16),

    // Conversions
    {"cvt.s16.s8", lanewise<convert<s16, s8>>},
    {"cvt.u16.u8", lanewise<convert<u16, u8>>},
    {"cvt.s32.s8", lanewise<convert<s32, s8>>},
    {"cvt.u32.u8", lanewise<convert<u32, u8>>},
    {"cvt.s64.s8", lanewise<convert<s64, s8>>},
    {"cvt.u64.u8", lanewise<convert<u64, u8>>},
    {"cvt.s32.s16", lanewise<convert<s32, s16>>},
    {"cvt.u32.u16", lanewise<convert<u32, u16>>},
    {"cvt.s64.s16", lanewise<convert<s64, s16>>},
    {"cvt.u64.u16", lanewise<convert<u64, u16>>},
    {"cvt.s64.s32", lanewise<convert<s64, s32>>},
    {"cvt.u64.u32", lanewise<convert<u64, u32>>},
    {"cvt.s64.s32/b64", lanewise<convert_low<s64, s32>>},  // from a register that is wider than the number
    {"cvt.u64.u32/b64", lanewise<convert_low<u64, u32>>},
    {"cvt.u16.u32 cvt.s16.s32 cvt.u16.s32 cvt.s16.u32", lanewise<convert<u16, u32>>},
    {"cvt.u16.u64", lanewise<convert<u16, u64>>},
    {"cvt.u32.u64 cvt.s32.s64 cvt.u32.s64 cvt.s32.u64", lanewise<convert<u32, u64>>},
    TO_FLOATS(s8),
    TO_FLOATS(u8),
    TO_FLOATS(s16),
    TO_FLOATS(u16),
    TO_FLOATS(s32),
    TO_FLOATS(u32),
    TO_FLOATS(s64),
    TO_FLOATS(u64),
    {"cvt.f32.f16", lanewise<convert_float<f32, f16>>},
    {"cvt.f32.bf16", lanewise<convert_float<f32, bf16>>},
    {"cvt.f64.f16", lanewise<convert_float<f64, f16>>},
    {"cvt.f64.bf16", lanewise<convert_float<f64, bf16>>},
    {"cvt.f64.f32", lanewise<convert_float<f64, f32>>},
    {"cvt.rn.f32.f64", lanewise<convert_float<f32, f64>>},
    {"cvt.rn.f16.f32", lanewise<narrow_f16>},
    {"cvt.rn.bf16.f32", lanewise<narrow_bf16>},
    {"cvt.rn.f16x2.f32", lanewise<narrow_pair<narrow_f16>>},
    {"cvt.rn.bf16x2.f32", lanewise<narrow_pair<narrow_bf16>>},
    {"cvt.rzi.s32.f32", lanewise<truncated<s32, f32>>},
    {"cvt.rzi.s64.f32", lanewise<truncated<s64, f32>>},
    {"cvt.rzi.s32.f64", lanewise<truncated<s32, f64>>},
    {"cvt.rzi.s64.f64", lanewise<truncated<s64, f64>>},
    {"cvt.rmi.f32.f32", lanewise<floored>},
    {"cvt.rmi.ftz.f32.f32", lanewise<ftz<floored>>},
    {"cvt.rpi.f32.f32", lanewise<ceiled>},
    {"cvt.rpi.ftz.f32.f32", lanewise<ftz<ceiled>>},
    {"cvt.rzi.f32.f32", lanewise<integral>},
    {"cvt.rzi.ftz.f32.f32", lanewise<ftz<integral>>},
    {"cvt.rni.f32.f32", lanewise<nearest_even>},
    {"cvt.rni.ftz.f32.f32", lanewise<ftz<nearest_even>>},

    // Flow
    {"bra bra.uni", {branch, ""}},
    {"ret exit", {end, ""}},
    {"bar.sync barrier.sync", {barrier, ""}},
    {"bar.warp.sync", {barrier_of_warp, "=4"}},
    // Fences: memory here is in program order.
    {"fence.proxy.async.shared::cta wgmma.fence.sync.aligned nop", {nothing, ""}},

    // Memory
    {"ld.param", {load_parameter, ""}},
    {"ld", {load, ""}},
    {"st", {store, ""}},
    {"red.add.u32 red.add.s32", atomic<add<u32>, false>},
    {"red.add.u64", atomic<add<u64>, false>},
    {"red.add.f32", atomic<fadd<f32>, false>},
    {"atom.add.u32 atom.add.s32", atomic<add<u32>, true>},
    {"atom.add.u64", atomic<add<u64>, true>},
    {"atom.add.f32", atomic<fadd<f32>, true>},
    {"ldmatrix", {load_matrix, ""}},
    {"stmatrix", {store_matrix, ""}},
    {"cp.async", {copy_async, ""}},
    {"cp.async.commit_group", {commit_copies, ""}},
    {"cp.async.wait_group", {wait_for_copies, ""}},

    // Whole warps
    {"shfl.sync.up.b32", {shuffle<Shuffle::kUp>, "4=4444"}},
    {"shfl.sync.down.b32", {shuffle<Shuffle::kDown>, "4=4444"}},
    {"shfl.sync.bfly.b32", {shuffle<Shuffle::kButterfly>, "4=4444"}},
    {"shfl.sync.idx.b32", {shuffle<Shuffle::kIndex>, "4=4444"}},
    {"redux.sync.add.s32 redux.sync.add.u32", redux<add<u32>>},
    {"redux.sync.min.s32", redux<smaller<s32>>},
    {"redux.sync.max.s32", redux<larger<s32>>},
    {"redux.sync.min.u32", redux<smaller<u32>>},
    {"redux.sync.max.u32", redux<larger<u32>>},
    {"redux.sync.and.b32", redux<bits_and<u32>>},
    {"redux.sync.or.b32", redux<bits_or<u32>>},
    {"redux.sync.xor.b32", redux<bits_xor<u32>>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", {mma<f16>, "4444=4444444444"}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma<bf16>, "4444=4444444444"}},
    {"wgmma.f16", {wgmma<f16>, ""}},
    {"wgmma.bf16", {wgmma<bf16>, ""}},
    {"wgmma.commit_group.sync.aligned", {commit_products, ""}},
    {"wgmma.wait_group.sync.aligned", {wait_for_products, ""}},
};

const int kNumInstructions = sizeof kInstructions / sizeof *kInstructions;

}  // namespace ptx
