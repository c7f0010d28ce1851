// The group that is a whole grid.
#pragma once

#include "device.h"

namespace cooperative_groups {

struct grid_group {
  void sync(cuda_host::Where where = cuda_host::Where::current()) const {
    cuda_host::sync_grid(where);
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
