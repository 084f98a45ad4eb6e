// One token through a decoder: RMSNorm, rotary attention over the cache, RMSNorm, SwiGLU, and the head. Everything in
// float32, W as stored.
//
// A block is five stages with a barrier after each; inside a stage threads own disjoint rows or heads, so the division
// among threads changes no bit. Norms are short: every thread computes its own copy.
#pragma once
#include <math.h>

#include "product.h"

namespace leangrid {
namespace {

inline void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
    Floats squares{};
    int64_t j = 0;
    for (; j + kFloats <= n; j += kFloats) squares = fused(load(x + j), load(x + j), squares);
    float total = sum(squares);
    for (; j < n; ++j) total += x[j] * x[j];
    const float scale = 1.0f / sqrtf(total / static_cast<float>(n) + epsilon);
    for (j = 0; j < n; ++j) out[j] = weight[j] * (x[j] * scale);
}

// For a product: zeros up to the next multiple of 16, where `out` still has what another stage left.
inline void padded_norm(const StepArgs& args, const float* weight, float* out) {
    rms_norm(args.x, weight, args.hidden, args.epsilon, out);
    for (int64_t j = args.hidden; j % 16; ++j) out[j] = 0.0f;
}

inline void rotate(float* head, const float* cos, const float* sin, int64_t n) {
    for (int64_t j = 0; j < n / 2; ++j) {
        const float a = head[j], b = head[j + n / 2];
        head[j] = a * cos[j] - b * sin[j];
        head[j + n / 2] = b * cos[j + n / 2] + a * sin[j + n / 2];
    }
}

inline float dot(const float* a, const float* b, int64_t n) {
    Floats sums{};
    int64_t j = 0;
    for (; j + kFloats <= n; j += kFloats) sums = fused(load(a + j), load(b + j), sums);
    float total = sum(sums);
    for (; j < n; ++j) total += a[j] * b[j];
    return total;
}

// score[p] = scale * query . keys[p], four positions at a time.
inline void scores(const float* query, const float* keys, int64_t positions, int64_t n, float scale, float* score) {
    int64_t p = 0;
    for (; p + 4 <= positions; p += 4) {
        Floats sums[4] = {};
        int64_t j = 0;
        for (; j + kFloats <= n; j += kFloats)
            for (int64_t i = 0; i < 4; ++i) sums[i] = fused(load(query + j), load(keys + (p + i) * n + j), sums[i]);
        four_sums(sums, score + p);
        for (int64_t i = 0; i < 4; ++i) {
            for (int64_t k = j; k < n; ++k) score[p + i] += query[k] * keys[(p + i) * n + k];
            score[p + i] *= scale;
        }
    }
    for (; p < positions; ++p) score[p] = scale * dot(query, keys + p * n, n);
}

// out = sum_p share[p] values[p] + last * value, a few vectors of the head at a time so that sums stay in registers.
inline void mix(const float* share, const float* values, int64_t positions, float last, const float* value, int64_t n, float* out) {
    constexpr int64_t kWide = 4 * kFloats;
    int64_t j = 0;
    for (; j + kWide <= n; j += kWide) {
        Floats sums[4];
        for (int64_t i = 0; i < 4; ++i) sums[i] = load(value + j + i * kFloats) * last;
        for (int64_t p = 0; p < positions; ++p)
            for (int64_t i = 0; i < 4; ++i) sums[i] = fused(spread(share[p]), load(values + p * n + j + i * kFloats), sums[i]);
        for (int64_t i = 0; i < 4; ++i) store(out + j + i * kFloats, sums[i]);
    }
    for (; j < n; ++j) {
        float total = last * value[j];
        for (int64_t p = 0; p < positions; ++p) total += share[p] * values[p * n + j];
        out[j] = total;
    }
}

// x[0..n) -> e^(x - limit), n rounded up to whole vectors: the caller's buffer has room.
inline void exponentials(float* x, int64_t n, float limit) {
    for (int64_t j = 0; j < n; j += kFloats) store(x + j, exponential(load(x + j) - limit));
}

// This thread's share of rows of x W^T, added to out or written.
inline void share(const Matrix& weight, const float* x, float* out, int64_t thread, int64_t threads) {
    const int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows;
    product_range({weight, x, 1, 0, out, 0}, thread * tiles / threads, (thread + 1) * tiles / threads);
}

inline void share_added(const Matrix& weight, const float* x, float* scratch, float* out, int64_t thread, int64_t threads) {
    const int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows, begin = thread * tiles / threads, end = (thread + 1) * tiles / threads;
    product_range({weight, x, 1, 0, scratch, 0}, begin, end);
    for (int64_t row = begin * kTileRows; row < least(end * kTileRows, weight.rows); ++row) out[row] += scratch[row];
}

// One head of queries against the cache and the token's own key and value.
inline void attend(const StepArgs& args, const Block& block, int64_t head, float* own) {
    const int64_t size = args.head_dim, group = args.heads / args.kv_heads, kv = head / group, past = args.position;
    float* query = args.qkv + head * size;
    const float* value = args.qkv + (args.heads + args.kv_heads + kv) * size;
    float *key = own, *score = own + size;
    memcpy(key, args.qkv + (args.heads + kv) * size, sizeof(float) * size);
    if (block.norm_q) rms_norm(query, block.norm_q, size, args.epsilon, query);
    if (block.norm_k) rms_norm(key, block.norm_k, size, args.epsilon, key);
    rotate(query, args.cos, args.sin, size);
    rotate(key, args.cos, args.sin, size);
    const float *keys = block.keys + kv * args.capacity * size, *values = block.values + kv * args.capacity * size;
    scores(query, keys, past, size, args.scaling, score);
    score[past] = args.scaling * dot(query, key, size);
    float highest = score[past], total = 0.0f;
    for (int64_t p = 0; p < past; ++p) highest = most(highest, score[p]);
    exponentials(score, past + 1, highest);
    for (int64_t p = 0; p <= past; ++p) total += score[p];
    for (int64_t p = 0; p <= past; ++p) score[p] /= total;
    mix(score, values, past, score[past], value, size, args.mixed + head * size);
    if (head % group == 0) {  // no thread reads position `past` in this stage
        memcpy(block.keys + (kv * args.capacity + past) * size, key, sizeof(float) * size);
        memcpy(block.values + (kv * args.capacity + past) * size, value, sizeof(float) * size);
    }
}

inline void swiglu(const StepArgs& args, const Block& block, float* own, int64_t thread, int64_t threads) {
    const int64_t n = args.intermediate, tiles = (n + kTileRows - 1) / kTileRows;
    const int64_t begin = thread * tiles / threads, end = (thread + 1) * tiles / threads;
    const int64_t from = begin * kTileRows, count = least(end * kTileRows, n) - from, padded = (args.hidden + 15) / 16 * 16;
    const int64_t room = (n + 31) / 16 * 16;
    float *normed = own, *gate = own + padded, *up = gate + room, *grown = up + room;
    padded_norm(args, block.norm_mlp, normed);
    product_range({block.gate, normed, 1, 0, gate, 0}, begin, end);
    product_range({block.up, normed, 1, 0, up, 0}, begin, end);
    for (int64_t j = 0; j < count; ++j) grown[j] = -gate[from + j];
    if (count > 0) exponentials(grown, count, 0.0f);
    for (int64_t j = 0; j < count; ++j) args.act[from + j] = gate[from + j] / (1.0f + grown[j]) * up[from + j];
}

void stage_of(const StepArgs& args, int64_t index, int stage, int64_t thread, int64_t threads) noexcept {
    const Block& block = args.blocks[index];
    float* own = args.own + thread * args.own_stride;
    if (stage == 0) {
        const int64_t size = args.head_dim;
        padded_norm(args, block.norm_attention, own);
        share(block.q, own, args.qkv, thread, threads);
        share(block.k, own, args.qkv + args.heads * size, thread, threads);
        share(block.v, own, args.qkv + (args.heads + args.kv_heads) * size, thread, threads);
    } else if (stage == 1) {
        for (int64_t head = thread * args.heads / threads; head < (thread + 1) * args.heads / threads; ++head) attend(args, block, head, own);
    } else if (stage == 2) {
        share_added(block.o, args.mixed, own, args.x, thread, threads);
    } else if (stage == 3) {
        swiglu(args, block, own, thread, threads);
    } else {
        share_added(block.down, args.act, own, args.x, thread, threads);
    }
}

void head_of(const StepArgs& args, int64_t thread, int64_t threads) noexcept {
    float* own = args.own + thread * args.own_stride;
    padded_norm(args, args.norm, own);
    share(args.head, own, args.logits, thread, threads);
}

}  // namespace
}  // namespace leangrid
