// The order and the sequences of a call, checked.
#pragma once

#include <cstdint>

namespace pydiffuse {

// Orders and offsets that would read out of bounds are refused before memory is touched.
inline const char* bad_steps(const int32_t* order, int64_t count, const int32_t* offsets,
                             int sequences, int64_t length) {
  if (order)
    for (int64_t i = 0; i < count; ++i)
      if (order[i] < 0 || order[i] >= length) return "order holds tokens that do not exist";
  if (!offsets) return nullptr;
  bool rising = offsets[0] == 0 && offsets[sequences] == length;
  for (int i = 0; i < sequences; ++i) rising = rising && offsets[i] <= offsets[i + 1];
  return rising ? nullptr : "offsets must rise from 0 to the number of steps";
}

}  // namespace pydiffuse
