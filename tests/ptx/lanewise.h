// Makes instructions of functions of numbers: f(a, b, ...) for each lane, and what uninitialised operands do to it.
#pragma once

#include <tuple>
#include <utility>

#include "warp.h"

namespace ptx {

template <class T>
constexpr char kLetter = std::is_same_v<T, bool> ? 'p' : sizeof(T) == 8 ? '8' : sizeof(T) == 4 ? '4' : '2';

template <class D, class... A>
constexpr char kLetters[] = {kLetter<D>, '=', kLetter<A>..., 0};

// A lane's result is uninitialised as soon as an operand is; unless `decides`, if given, says of an initialised operand
// that the others make no difference.
template <auto f, auto decides>
struct Lanewise;

template <class D, class... A, D (*f)(A...), auto decides>
struct Lanewise<f, decides> {
  static void execute(Cta&, Warp& warp, const Instruction& i, Mask mask) {
    run(warp.registers, i.operand, mask, std::index_sequence_for<A...>{});
  }

  template <size_t... k>
  static void run(Registers& registers, const s32* operand, Mask mask, std::index_sequence<k...>) {
    const std::tuple<Lanes<A>...> a{registers.get<A>(operand[1 + k])...};
    Lanes<D> d;
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = to_cell<D>(f(from_cell<A>(std::get<k>(a)[lane])...));
    Mask tainted = (registers.taint(operand[1 + k]) | ...);
    if constexpr (!std::is_null_pointer_v<decltype(decides)>) {
      if (tainted & mask) (..., (tainted &= ~decided(std::get<k>(a), ~registers.taint(operand[1 + k]))));
    }
    registers.set(operand[0], d, mask, tainted);
  }

  template <class C>
  static Mask decided(const std::array<C, kLanes>& a, Mask initialised) {
    using T = std::tuple_element_t<0, std::tuple<A...>>;
    Mask lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= Mask{decides(from_cell<T>(a[lane]))} << lane;
    return lanes & initialised;
  }
};

template <class F>
constexpr const char* kOperands = nullptr;
template <class D, class... A>
constexpr const char* kOperands<D (*)(A...)> = kLetters<D, A...>;

template <auto f>
constexpr Operation lanewise{&Lanewise<f, nullptr>::execute, kOperands<decltype(f)>};
template <auto f, auto decides>
constexpr Operation decided{&Lanewise<f, decides>::execute, kOperands<decltype(f)>};

}  // namespace ptx
