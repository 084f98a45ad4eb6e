// A row sorted once, with the prefix sums from which any sum over an interval of it takes O(1).
#pragma once
#include "base.h"

namespace leangrid {
namespace {

struct SortedRow {
    int64_t n;
    double* value;
    double* share;
    double *p0, *p1, *p2;  // anchored prefix sums, n + 1
    double centre;
    int64_t distinct;
    uint64_t *keys, *spare;

    void build(const float* weight, const double* importance) {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = float_bits(weight[i] + 0.0f);
            const uint32_t key = bits ^ (static_cast<uint32_t>(-static_cast<int32_t>(bits >> 31)) | 0x80000000u);
            keys[i] = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(i);
        }
        radix_sort(keys, spare, n);
        distinct = 0;
        for (int64_t r = 0; r < n; ++r) {
            const int64_t i = static_cast<int64_t>(keys[r] & 0xffffffffu);
            value[r] = weight[i] + 0.0f;
            share[r] = importance[i];
            distinct += r == 0 || value[r] != value[r - 1] ? 1 : 0;
        }
        const int64_t middle = n / 2;
        centre = value[middle];
        double s0 = 0.0, s1 = 0.0, s2 = 0.0;
        p0[middle] = p1[middle] = p2[middle] = 0.0;
        for (int64_t r = middle; r < n; ++r) {
            const double x = value[r] - centre, first = share[r] * x;
            p0[r + 1] = s0 += share[r];
            p1[r + 1] = s1 += first;
            p2[r + 1] = s2 += first * x;
        }
        s0 = s1 = s2 = 0.0;
        for (int64_t r = middle - 1; r >= 0; --r) {
            const double x = value[r] - centre, first = share[r] * x;
            p0[r] = -(s0 += share[r]);
            p1[r] = -(s1 += first);
            p2[r] = -(s2 += first * x);
        }
    }

    double mass(int64_t left, int64_t right) const { return p0[right] - p0[left]; }

    double cost(int64_t left, int64_t right) const {
        const double s0 = mass(left, right), s1 = p1[right] - p1[left], s2 = p2[right] - p2[left];
        return most(0.0, s2 - (s0 > 0.0 ? s1 * s1 / s0 : 0.0));
    }

    double centroid(int64_t left, int64_t right) const {  // of a non-empty interval
        const double s0 = mass(left, right), low = value[left], high = value[right - 1];
        if (!(s0 > 0.0)) return 0.5 * (low + high);
        return least(most((p1[right] - p1[left]) / s0 + centre, low), high);
    }

    // Levels rounded to float32 and their cost, summed over the row. Few distinct values: exactly those, the first
    // repeated in front.
    double finish(double* level, int k, float* out) const {
        if (distinct <= k) {
            int slot = k;
            for (int64_t r = n - 1; r >= 0; --r)
                if (r == n - 1 || value[r] != value[r + 1]) level[--slot] = value[r];
            while (slot > 0) level[--slot] = value[0];
        }
        for (int i = 0; i < k; ++i) level[i] = out[i] = static_cast<float>(level[i]);
        double sum = 0.0;
        int64_t r = 0;
        for (int i = 0; i < k; ++i) {
            const int64_t stop = i + 1 < k ? rank_of(value, n, 0.5 * (level[i] + level[i + 1])) : n;
            for (; r < stop; ++r) {
                const double error = value[r] - level[i];
                sum += share[r] * error * error;
            }
        }
        return sum;
    }
};

}  // namespace
}  // namespace leangrid
