// Tile attention with products of bfloat16 pairs, summed in float32: where the CPU multiplies them.
#include "attention.h"

#if defined(__AVX512BF16__)
#include "attention_table.h"

PYDIFFUSE_TABLE(AttentionKernels, attention_bf16) = pydiffuse::attention_table<pydiffuse::Pairs>();
#else
#include "simd.h"

PYDIFFUSE_TABLE(AttentionKernels, attention_bf16) = {};
#endif
