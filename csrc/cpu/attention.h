// The CPU kernels of tile attention, as the bindings call them: functions over a range of work
// items.
//
// Forward: an item is a block of queries of one head. Neighbouring items share a key head, whose
// keys and values are packed at first need. Backward: an item is a part of the blocks of all heads
// that share a key head. What an item is depends on the sizes alone, so the number of threads
// changes no bit of the result.
#pragma once

#include "../attention.h"

namespace pydiffuse {

struct AttentionBackwardArgs {
  AttentionBackwardCall call;
  int64_t parts;        // of a key head's blocks
  const int64_t* cuts;  // [plan heads, parts + 1] blocks
  float* partial;  // [batch, kv_heads, parts, 2, keys, padded dim] dk and dv; null if parts is 1
};

struct AttentionKernels {                            // null where the instruction set has none
  int64_t (*forward_scratch)(const AttentionCall&);  // floats that a call to `forward` needs
  void (*forward)(const AttentionCall&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const AttentionBackwardArgs&);
  int64_t (*padded)(int dim);  // floats of a row of a partial sum
  void (*backward)(const AttentionBackwardArgs&, int64_t begin, int64_t end, float* scratch);
  // Sums of the parts; items: [batch, kv_heads, 2]; scratch: a padded row.
  void (*reduce)(const AttentionBackwardArgs&, int64_t begin, int64_t end, float* scratch);
  // The arithmetic of the floor, in cache: for each pair of a query and a key `products` sums of
  // `dim` products, and `exponentials`. A strip is so many pairs.
  int64_t strip;
  int64_t (*floor_scratch)(int dim);
  void (*floor)(int dim, int products, int exponentials, int64_t strips, float* scratch);
};

}  // namespace pydiffuse

// Products of float32, and of bfloat16 pairs.
extern "C" {
__attribute__((
    visibility("hidden"))) extern const pydiffuse::AttentionKernels pydiffuse_attention_default,
    pydiffuse_attention_avx2, pydiffuse_attention_avx512, pydiffuse_attention_bf16_default,
    pydiffuse_attention_bf16_avx2, pydiffuse_attention_bf16_avx512;
}
