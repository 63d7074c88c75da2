// What a kernel is given: shapes, strides and pointers, and the threads to run on. No framework's types, and nothing
// here has code of its own, so that every instruction set's build of the kernels can share these types.
#pragma once

#include <cstddef>
#include <cstdint>

namespace skink {

enum class Dtype { float32, bfloat16, float16 };

// Threads of the caller's own pool. `run` calls body(context, i) once for each i in [0, workers), at once or one after
// the other, and returns when all are done.
struct Pool {
    int threads;
    void (*run)(int workers, void (*body)(void* context, int worker), void* context);
};

// y = x / sqrt(mean(x^2) + eps) * (offset + weight), row by row; y is contiguous.
struct RmsNorm {
    Dtype dtype;
    Dtype weight_dtype;  // `dtype` or float32
    const void* input;   // [rows, width]
    const void* weight;  // [width], or null for no scaling
    void* output;        // [rows, width]
    int64_t rows, width;
    int64_t input_stride;  // elements between rows
    float eps, offset;
};

// The first `rotated` of `width` features turned by the angles whose cosines and sines are given, the rest copied;
// output is contiguous.
struct Rotary {
    Dtype dtype;
    bool interleaved;   // pairs (0, 1), (2, 3), ... instead of (i, i + rotated / 2)
    const void* input;  // [batch, heads, tokens, width]
    const void* cosine;  // [batch or 1, tokens, rotated]; stride 0 for the one
    const void* sine;
    void* output;
    int64_t batch, heads, tokens, width, rotated;
    int64_t input_batch, input_head, input_token;  // strides in elements
    int64_t cosine_batch, cosine_token, sine_batch, sine_token;
};

// softmax(scale * query . key) . value for the last `tokens` of `keys` positions; output is contiguous.
struct Attention {
    Dtype dtype;
    const void* query;  // [batch, heads, tokens, width]
    const void* key;    // [batch, key_heads, keys, width]
    const void* value;  // [batch, key_heads, keys, value_width]
    void* output;       // [batch, heads, tokens, value_width]
    const uint8_t* key_mask;  // [batch, keys], 0 where the key is padding; null where none is
    const float* sinks;       // [heads], or null
    const float* alibi;       // [heads], what a score gains for each position that the key lies after; or null
    int64_t batch, heads, key_heads, tokens, keys, width, value_width;
    int64_t query_batch, query_head, query_token;  // strides in elements
    int64_t key_batch, key_head, key_token;
    int64_t value_batch, value_head, value_token;
    int64_t mask_batch;
    bool causal;
    int64_t window;  // 0 for none
    float scale, softcap;
};

// (input . down^T) . up^T + bias; output is contiguous.
struct LowRankLinear {
    Dtype dtype;
    const void* input;  // [tokens, width]
    const void* down;   // [rank, width]
    const void* up;     // [outputs, rank]
    const void* bias;   // [outputs], or null
    void* output;       // [tokens, outputs]
    int64_t tokens, width, rank, outputs;
    int64_t input_stride, down_stride, up_stride;  // elements between rows
};

// (z, z . rest^T + rest_bias) with z = input . kept^T + kept_bias, or that in another order; output is contiguous.
struct PivotedLinear {
    Dtype dtype;
    const void* input;      // [tokens, width]
    const void* kept;       // [rank, width]
    const void* rest;       // [others, rank]
    const void* kept_bias;  // [rank], or null
    const void* rest_bias;  // [others], or null
    const int64_t* order;   // [outputs], each below rank + others; or null, and outputs = rank + others
    void* output;           // [tokens, outputs]
    int64_t tokens, width, rank, others, outputs;
    int64_t input_stride, kept_stride, rest_stride;  // elements between rows
};

// The kernels of one instruction set.
struct Kernels {
    void (*rms_norm)(const RmsNorm&, const Pool&);
    void (*rotary)(const Rotary&, const Pool&);
    // `scratch` holds attention_scratch(problem, pool) bytes, aligned to 64.
    void (*attention)(const Attention&, const Pool&, void* scratch);
    size_t (*attention_scratch)(const Attention&, const Pool&);
    // Likewise with low_rank_linear_scratch.
    void (*low_rank_linear)(const LowRankLinear&, const Pool&, void* scratch);
    size_t (*low_rank_linear_scratch)(const LowRankLinear&, const Pool&);
    void (*pivoted_linear)(const PivotedLinear&, const Pool&, void* scratch);
    size_t (*pivoted_linear_scratch)(const PivotedLinear&, const Pool&);
};

}  // namespace skink
