// Tile attention: the vocabulary of kernels and bindings.
//
// A plan cuts queries and keys into tiles and says which tiles of keys a tile of queries sees, as
// spans of keys: whole ones, or one tile with a mask of bits. pydiffuse/plans/plan.py makes it.
#pragma once

#include "tensor.h"

namespace pydiffuse {

constexpr int ATTENTION_BLOCK = 128;  // rows of a block of work, at most
constexpr int MAX_HEAD_DIM = 256;
constexpr int FULL = -1;  // in the place of a mask

struct Heads {  // [batch, heads, tokens, dim], a token's features side by side
  void* data = nullptr;
  int64_t stride[3] = {};
  DType dtype = DType::f32;

  // Elements before a token.
  int64_t at(int64_t b, int64_t h, int64_t token) const {
    return b * stride[0] + h * stride[1] + token * stride[2];
  }
};

struct PlanSide {  // the tiles of queries (or keys), and what they see of the keys (or queries)
  int64_t tiles = 0, blocks = 0, spans = 0;
  const int32_t* bounds = nullptr;  // [tiles + 1]
  const int32_t* starts = nullptr;  // [heads, tiles + 1] into spans
  const int32_t* span = nullptr;    // [spans, 3] begin, end, mask
  const int32_t* block = nullptr;   // [heads, blocks, 3] tile, first row, end
};

struct Plan {
  int64_t heads = 1;  // 1: all heads share it
  int64_t masks = 0, words = 0;
  PlanSide q, k;
  const int32_t* word = nullptr;     // [words] bits; a row of a mask is cdiv(keys of the tile, 32)
  const int64_t* mask_at = nullptr;  // [masks] the first word
  const int32_t* order = nullptr;    // [tokens] position -> token, or null

  int64_t token(int64_t position) const { return order ? order[position] : position; }
};

struct AttentionCall {
  int64_t batch, heads, kv_heads, queries, keys;
  int dim;
  Heads q, k, v, out;
  float* lse;           // [batch, heads, queries], or null
  const float* scales;  // [heads], or null: `scale` for all
  float scale;
  Plan plan;

  int64_t kv_head(int64_t h) const { return h * kv_heads / heads; }
  int64_t plan_head(int64_t h) const { return plan.heads == 1 ? 0 : h; }
  float scale_of(int64_t h) const { return scales ? scales[h] : scale; }
};

struct AttentionBackwardCall {
  AttentionCall forward;
  Heads dout, dq, dk, dv;
  const float* dlse;  // [batch, heads, queries], or null
};

}  // namespace pydiffuse
