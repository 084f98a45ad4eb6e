// What the three instruction-set builds of decode.cpp hand to bindings_decode.h: stored weights -> codes, dense rows
// and products, and the stages of one token through a decoder. Range functions allocate their own scratch, never throw,
// return false when memory is short.
#pragma once
#include <cstdint>

namespace leangrid {

constexpr int64_t kTileRows = 4;  // rows side by side in a tile of codes (codes.h)

enum Dtype { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct CodesArgs {
    int32_t* words;  // [rows, ceil(cols * bits / 32)]: one dense bit stream a row, as stored
    uint8_t* codes;  // [rows, cols]
    uint8_t* tiles;  // [ceil(rows / 4), tile_bytes(cols, bits)]
    int64_t rows, cols;
    int bits;
};

struct Matrix {  // W [rows, cols]
    int64_t rows, cols;
    const uint8_t* tiles;       // codes in tiles; nullptr: W is dense
    const void* values;         // LUT [rows, 2^bits], or scales [rows, groups], or the dense W
    int dtype;                  // of values: kFloat32 or kBfloat16
    const uint8_t* zero_point;  // [rows, groups]; nullptr: a LUT
    int bits;
    int64_t group_size;  // columns a scale
    int rounding;        // Dtype that an affine W is rounded to
    const float* bias;   // [rows] or nullptr
};

struct ProductArgs {
    Matrix weight;
    const float* x;  // [tokens, stride], zeros from cols to the next multiple of 16
    int64_t tokens, stride;
    float* out;  // [tokens, out_stride]
    int64_t out_stride;
};

struct DenseArgs {
    Matrix weight;
    void* out;  // [rows from first_row on, cols]
    int dtype;  // of out: kFloat32 or kBfloat16
    int64_t first_row;
};

struct Block {  // one decoder layer: RMSNorm, rotary attention, RMSNorm, SwiGLU
    Matrix q, k, v, o, gate, up, down;
    const float *norm_attention, *norm_mlp;  // [hidden]
    const float *norm_q, *norm_k;            // [head_dim], or nullptr
    float *keys, *values;                    // [kv_heads, capacity, head_dim]
};

struct StepArgs {
    const Block* blocks;
    int64_t count, hidden, intermediate, heads, kv_heads, head_dim, capacity;
    float epsilon, scaling;
    const float* norm;  // [hidden], the last one
    Matrix head;
    int64_t position;         // of this token: what the cache holds before it
    const float *cos, *sin;   // [head_dim] at this position
    float* x;                 // [hidden]: the embedding, then the residual stream
    float *qkv, *mixed, *act;  // [heads + 2 kv_heads, head_dim], [padded heads * head_dim], [padded intermediate]
    float* own;                // [threads, scratch_floats]: a thread's own
    int64_t own_stride;
    float* logits;  // [vocabulary]
};

constexpr int kStages = 5;

struct DecodeTable {
    bool (*unpack)(const CodesArgs&, int64_t begin, int64_t end) noexcept;  // words -> codes, rows
    bool (*pack)(const CodesArgs&, int64_t begin, int64_t end) noexcept;    // codes -> words, rows
    bool (*tile)(const CodesArgs&, int64_t begin, int64_t end) noexcept;    // words -> tiles, tiles
    bool (*untile)(const CodesArgs&, int64_t begin, int64_t end) noexcept;  // tiles -> words, tiles
    bool (*product)(const ProductArgs&, int64_t begin, int64_t end) noexcept;   // tiles
    bool (*dense)(const DenseArgs&, int64_t begin, int64_t end) noexcept;       // tiles
    void (*stage)(const StepArgs&, int64_t block, int stage, int64_t thread, int64_t threads) noexcept;
    void (*head)(const StepArgs&, int64_t thread, int64_t threads) noexcept;
};

// Bytes a lane of the last, shorter chunk of a row: `steps` codes of `bits` bits.
constexpr int64_t tail_bytes(int64_t steps, int bits) { return (steps * bits + 7) / 8; }

// Bytes of a tile of four rows: chunks of 16 lanes x 32 bits a row, then the tail.
constexpr int64_t tile_bytes(int64_t cols, int bits) {
    const int64_t steps = (cols + 15) / 16, per = 32 / bits;
    return kTileRows * (steps / per * 64 + 16 * tail_bytes(steps % per, bits));
}

}  // namespace leangrid
