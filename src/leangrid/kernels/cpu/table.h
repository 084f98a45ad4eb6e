// What the three instruction-set builds of kernels.cpp hand to module.cpp: plain arguments and plain functions over a
// range of rows. A range function allocates its own scratch, never throws and returns false only when memory is short.
#pragma once
#include <cstdint>

namespace leangrid {

struct KmeansArgs {
    const float* weight;       // [rows, n]
    const double* importance;  // [n], or [rows, n] when per_row
    int64_t n;
    bool per_row;
    int levels;
    int iterations;     // 0: dynamic programming
    float* out;         // [rows, levels]
    double* objective;  // [rows]
};

struct AffineArgs {
    const float* weight;       // [items, n]; an item is one group of one row
    const double* importance;  // item i reads at (i % period) * n
    int64_t n, period;
    int levels, steps, shrink_steps;
    bool symmetric;
    int dtype;  // 0 float32, 1 float16, 2 bfloat16
    double smallest, largest;
    float* scale;
    uint8_t* zero_point;
    double* objective;
};

// Nearest-level grids for the sweep and the descent. levels != nullptr: a row's own levels; else scale, group, and
// offset or zero_point.
struct GridArgs {
    const float* levels;
    int count;  // K
    const float* scale;
    const uint8_t* zero_point;
    const float* offset;
    const int32_t* group;
    int64_t groups;
};

struct SweepArgs {
    const float* weight;  // [rows, b]; the gradient for the descent
    const float* square;  // [b, b]: U, or H for the descent
    int64_t b;
    GridArgs grid;
    uint8_t* codes;  // in and out for the descent
    float* error;    // scaled error, or the change of Q
};

struct GramArgs {
    const float* hessian;  // [n, n]
    const uint8_t* codes;  // [rows, n]
    int64_t n;
    int levels;
    double* out;  // [rows, levels, levels]
};

struct ExactArgs {
    const float* weight;    // [rows, n]
    const double* inverse;  // [n, n]
    int64_t n;
    const float* levels;  // [rows, K]; or nullptr, then the next four
    int count;            // K
    const float* scale;   // [rows, groups]
    const double* zero;   // [rows, groups]
    const int32_t* group;  // [n]
    int64_t groups;
    uint8_t* codes;
    double* loss;  // [rows]
};

struct KernelTable {
    bool (*kmeans)(const KmeansArgs&, int64_t begin, int64_t end) noexcept;
    bool (*affine)(const AffineArgs&, int64_t begin, int64_t end) noexcept;
    bool (*sweep)(const SweepArgs&, int64_t begin, int64_t end) noexcept;
    bool (*descend)(const SweepArgs&, int64_t begin, int64_t end) noexcept;
    bool (*gram)(const GramArgs&, int64_t begin, int64_t end) noexcept;
    bool (*exact)(const ExactArgs&, int64_t begin, int64_t end) noexcept;
};

}  // namespace leangrid
