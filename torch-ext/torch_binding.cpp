// The ops of the hub kernel, with the schemas of pydiffuse/_core/schemas.py; a test compares them.
#include <torch/csrc/stable/library.h>

#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  m.def(
      "guide(Tensor(a!)[] out, Tensor[] preds, Tensor? x, Tensor? history, Tensor? noise, int "
      "rule, float[] params, bool rescaled, Tensor? varied, int[] columns, int emit) -> ()");
  m.def(
      "guide_backward(Tensor(a!)[] dpreds, Tensor(b!)? dvaried, Tensor grad, Tensor[] preds, int "
      "rule, float[] params, bool rescaled, Tensor? varied, int[] columns) -> ()");
  m.def("mix(Tensor(a!)[] out, Tensor[] terms, Tensor matrix, Tensor? shift) -> ()");
  m.def("gram(Tensor(a!) out, Tensor(b!)? sums, Tensor[] preds) -> ()");
  m.def(
      "modulate(Tensor(a!) y, Tensor(b!)? r, Tensor x, Tensor? branch, Tensor table, Tensor rows, "
      "int norm, float eps, bool factors) -> ()");
  m.def(
      "modulate_backward(Tensor(a!) dx, Tensor(b!)? dbranch, Tensor(c!) dtable, Tensor dy, Tensor? "
      "dr, Tensor x, Tensor? branch, Tensor table, Tensor rows, int norm, float eps, bool factors) "
      "-> ()");
  m.def("guide.rule(Tensor[] preds, Tensor numbers) -> Tensor?");
  m.def(
      "guide.new(Tensor[] preds, Tensor? x, Tensor? history, Tensor? noise, Tensor numbers) -> "
      "(Tensor?, Tensor?, Tensor?)");
  m.def(
      "guide.into(Tensor(a!)[] out, Tensor[] preds, Tensor? x, Tensor? history, Tensor? noise, "
      "Tensor numbers) -> bool");
  m.def(
      "modulate.new(Tensor x, Tensor? branch, Tensor table, Tensor rows, int norm, float eps) -> "
      "(Tensor?, Tensor?)");
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
