// Adaptive layer norm on XLA's buffers: x, branch, y, r [R, D] of one dtype; table [K, 2 or 3, D]
// float32; rows [R] int32.
#include "../cpu/adaln_call.h"

#include "mapped.h"

namespace pydiffuse {
namespace {

enum Has { HAS_BRANCH = 1, HAS_DR = 2 };

struct ModulateArrays {
  Buffer x, branch, table, row;

  ModulateArrays(Call& call, bool with_branch) : x(call.input()) {
    if (with_branch) branch = call.input();
    table = call.input();
    row = call.input();
  }
};

class ModulationOf {
 public:
  ModulationOf(const Call& call, const ModulateArrays& arrays, const Mapped& mapped,
               bool with_branch)
      : arrays_(arrays), mapped_(mapped), with_branch_(with_branch) {
    require(arrays.x.dims.size() >= 2 && arrays.table.dims.size() >= 3,
            "tokens must be [R, D], the table [K, 2 or 3, D]");
    Modulation& m = common_;
    m.tokens = arrays.x.dims[arrays.x.dims.size() - 2];
    m.n = arrays.x.dims.back();
    m.columns = with_branch ? 3 : 2;
    m.table_rows = arrays.table.dims[arrays.table.dims.size() - 3];
    const int64_t norm = call.integer("norm");
    require(norm >= 0 && norm < static_cast<int>(Norm::count), "unknown norm");
    m.norm = static_cast<Norm>(norm);
    m.eps = static_cast<float>(call.get<double>("eps"));
    m.factors = call.flag("factors");
  }

  Rows tokens(const Buffer& b, int64_t v) const {
    const DType dtype = dtype_of(b);
    require(dtype == dtype_of(arrays_.x), "tokens must have one dtype");
    return {mapped_.at(b, v, {common_.tokens, common_.n}), common_.n, dtype};
  }
  float* table(const Buffer& b, int64_t v) const {
    return mapped_.plane<float>(b, v, {common_.table_rows, common_.columns, common_.n});
  }
  Modulation at(int64_t v) const {
    Modulation m = common_;
    m.x = tokens(arrays_.x, v);
    if (with_branch_) m.branch = tokens(arrays_.branch, v);
    m.table = table(arrays_.table, v);
    m.row = mapped_.plane<const int32_t>(arrays_.row, v, {m.tokens});
    for (int64_t i = 0; i < m.tokens; ++i)
      if (m.row[i] < 0 || m.row[i] >= m.table_rows)
        refuse("rows holds " + std::to_string(m.row[i]) + "; accepted: 0 to " +
               std::to_string(m.table_rows - 1) + ", the rows of table");
    return m;
  }

 private:
  const ModulateArrays& arrays_;
  const Mapped& mapped_;
  const bool with_branch_;
  Modulation common_{};
};

// -> y, or r and y with a branch
void modulate_xla(Call& call) {
  const bool branch = call.integer("has") & HAS_BRANCH;
  const ModulateArrays arrays(call, branch);
  const Buffer r = branch ? call.output() : Buffer(), y = call.output();
  const Mapped mapped(y, 2);
  const ModulationOf of(call, arrays, mapped, branch);
  for (int64_t v = 0; v < mapped.count(); ++v) {
    ModulateCall c{of.at(v), {}, {}};
    c.y = of.tokens(y, v);
    if (branch) c.r = of.tokens(r, v);
    modulate(c, call.threads);
  }
}

// the forward's arrays, dy, dr or none -> dx, dtable, dbranch or none
void modulate_backward_xla(Call& call) {
  const int64_t has = call.integer("has");
  const bool branch = has & HAS_BRANCH;
  const ModulateArrays arrays(call, branch);
  const Buffer dy = call.input(), dr = has & HAS_DR ? call.input() : Buffer();
  const Buffer dx = call.output(), dtable = call.output(),
               dbranch = branch ? call.output() : Buffer();
  const Mapped mapped(dx, 2);
  const ModulationOf of(call, arrays, mapped, branch);
  for (int64_t v = 0; v < mapped.count(); ++v) {
    ModulateBackwardCall c{};
    static_cast<Modulation&>(c) = of.at(v);
    c.dx = of.tokens(dx, v);
    c.dtable = of.table(dtable, v);
    c.dy = of.tokens(dy, v);
    if (branch) c.dbranch = of.tokens(dbranch, v);
    if (has & HAS_DR) c.dr = of.tokens(dr, v);
    modulate_backward(c, call.threads);
  }
}

}  // namespace

std::vector<Handler> adaln_handlers() {
  return {{"modulate", handler<modulate_xla>},
          {"modulate_backward", handler<modulate_backward_xla>}};
}

}  // namespace pydiffuse
