// Every operator of the library, in the order of the data's way. See docs/ for what they compute.
#include <torch/csrc/stable/library.h>

#include <string>

#include "rowops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(condense, m) {
  m.def(
      "similarity(Tensor keys, Tensor? scores=None, Tensor? mask=None) -> (Tensor s, Tensor sbar, Tensor g, Tensor "
      "tier)");
  m.def(
      "greedy_select(Tensor s, Tensor prior, SymInt k, *, Tensor? sbar=None, Tensor? tier=None, "
      "float suppression=1.0) -> Tensor order");
  m.def(
      "assign(Tensor s, Tensor indices, *, Tensor? tier=None, SymInt[]? grid=None, Tensor? positions=None, "
      "float spatial_weight=1.0) -> Tensor assignment");
  m.def("merge(Tensor features, Tensor scores, Tensor indices, Tensor assignment) -> (Tensor merged, Tensor mass)");
  m.def(
      "merge_backward(Tensor grad_merged, Tensor grad_mass, Tensor features, Tensor scores, Tensor merged, Tensor "
      "mass, Tensor indices, Tensor assignment) -> (Tensor grad_features, Tensor grad_scores)");
  m.def(
      "select_and_merge(Tensor features, Tensor scores, SymInt num_anchors, SymInt num_background, *, "
      "Tensor? keys=None, SymInt[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0, "
      "float spatial_weight=1.0) -> (Tensor merged, Tensor indices, Tensor assignment, Tensor mass)");
  m.def(
      "select_and_merge_varlen(Tensor features, Tensor scores, Tensor cu_seqlens, Tensor cu_anchors, Tensor "
      "cu_background, SymInt total_keep, SymInt max_seqlen, *, Tensor? keys=None, Tensor? positions=None, float "
      "suppression=1.0, float spatial_weight=1.0) -> (Tensor merged, Tensor indices, Tensor assignment, Tensor mass)");
  m.def(
      "select_and_merge_out(Tensor features, Tensor scores, SymInt num_anchors, SymInt num_background, *, "
      "Tensor? keys=None, SymInt[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0, "
      "float spatial_weight=1.0, Tensor(a!)? workspace=None, Tensor(b!) merged, Tensor(c!) indices, "
      "Tensor(d!) assignment, Tensor(e!) mass) -> ()");
  m.def(
      "workspace_bytes(Tensor features, Tensor scores, int num_anchors, int num_background, *, Tensor? keys=None, "
      "int[]? grid=None, Tensor? positions=None, Tensor? mask=None, float suppression=1.0, float spatial_weight=1.0) "
      "-> int");
  m.def("cpu_capability() -> str");  // which instruction set the CPU kernels run with
}

static std::string cpu_capability() { return condense::row_ops<float>().instruction_set; }

STABLE_TORCH_LIBRARY_IMPL(condense, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
