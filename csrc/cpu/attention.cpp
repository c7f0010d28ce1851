// Tile attention with products of float32: every dtype, every instruction set.
#include "attention_table.h"

PYDIFFUSE_TABLE(AttentionKernels, attention) = pydiffuse::attention_table<pydiffuse::Singles>();
