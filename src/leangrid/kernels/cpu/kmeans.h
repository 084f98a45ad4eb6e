// Weighted one-dimensional k-means, globally optimal or Lloyd's; the mathematics and the exact arithmetic are those of
// plain/kmeans.py.
//
// Faster for the same optimum: equal values are merged (an optimum never splits them), and from kPathLevels levels on
// it is a shortest path (kmeans_path.h). Else, and where that finds no lambda for K, layers: from both ends, meeting in
// the middle (K/2 layers each); a prefix that already costs more than Lloyd's whole result is dropped.
#pragma once
#include "base.h"
#include "kmeans_path.h"
#include "sorted_row.h"
#include "table.h"

namespace leangrid {
namespace {

constexpr int kStartBins = 128;
constexpr int kPad = 16;
constexpr int kPathLevels = 8;  // from this many levels on the path is faster than layers; measured

// ------------------------------------------------------------------------------------------------ Lloyd

// mass^(1/3) width^(2/3) of bins of equal count: the optimal density of many levels (Panter and Dite 1951). Returns the
// number of bins.
inline int level_density(const SortedRow& row, double* edge, double* density) {
    const int bins = static_cast<int>(least<int64_t>(row.n, kStartBins));
    double power[kStartBins];
    for (int b = 0; b <= bins; ++b) edge[b] = row.value[least(b * row.n / bins, row.n - 1)];
    for (int b = 0; b < bins; ++b) {
        const double width = edge[b + 1] - edge[b];
        power[b] = (row.mass(b * row.n / bins, (b + 1) * row.n / bins) * width) * width;
        density[b] = 1.0;
    }
    for (int turn = 0; turn < 4; ++turn)
        for (int b = 0; b < bins; ++b) {
            power[b] = __builtin_sqrt(__builtin_sqrt(power[b]));
            density[b] = density[b] * power[b];
        }
    return bins;
}

inline void lloyd_start(const SortedRow& row, int k, double* level) {
    const double low = row.value[0], high = row.value[row.n - 1];
    if (k <= 8) {
        for (int i = 0; i < k; ++i) level[i] = low + (high - low) * i / most(1, k - 1);
        return;
    }
    double density[kStartBins], edge[kStartBins + 1], upto[kStartBins];
    const int bins = level_density(row, edge, density);
    double sum = 0.0;
    for (int b = 0; b < bins; ++b) upto[b] = sum += density[b];
    int spot = 0;
    for (int i = 0; i < k; ++i) {
        const double target = sum * ((i + 0.5) / k);
        while (spot < bins - 1 && upto[spot] < target) ++spot;
        const double inside = (target - (upto[spot] - density[spot])) / density[spot];
        level[i] = edge[spot] + (inside > 0.0 ? least(inside, 1.0) : 0.0) * (edge[spot + 1] - edge[spot]);
    }
}

inline void relocate(const SortedRow& row, const int64_t* bound, double* level, int k) {
    int empty = -1, worst = 0;
    double high = -1.0;
    for (int i = 0; i < k; ++i) {
        if (empty < 0 && !(row.mass(bound[i], bound[i + 1]) > 0.0)) empty = i;
        const double cost = row.cost(bound[i], bound[i + 1]);
        if (cost > high) {
            high = cost;
            worst = i;
        }
    }
    if (empty < 0 || !(high > 0.0)) return;
    const double first = row.value[bound[worst]], last = row.value[bound[worst + 1] - 1], centre = level[worst];
    level[empty] = centre - first > last - centre ? first : last;
    for (int i = 1; i < k; ++i)
        for (int j = i; j > 0 && level[j] < level[j - 1]; --j) {
            const double swap = level[j];
            level[j] = level[j - 1];
            level[j - 1] = swap;
        }
}

inline void lloyd(const SortedRow& row, int k, int iterations, double* level, int64_t* bound) {
    lloyd_start(row, k, level);
    for (int i = 0; i < k; ++i) bound[i] = -1;
    bound[k] = row.n;
    for (int turn = 0; turn < iterations; ++turn) {
        bool moved = bound[0] != 0, empty = false;
        bound[0] = 0;
        for (int i = 1; i < k; ++i) {
            const int64_t at = rank_of(row.value, row.n, 0.5 * (level[i - 1] + level[i]));
            moved |= at != bound[i];
            bound[i] = at;
        }
        if (!moved) break;
        for (int i = 0; i < k; ++i) {
            if (row.mass(bound[i], bound[i + 1]) > 0.0) level[i] = row.centroid(bound[i], bound[i + 1]);
            else empty = true;
        }
        if (empty) relocate(row, bound, level, k);
    }
}

// ------------------------------------------------------------------------------------------------ dynamic programming

struct Best {
    double value;
    int64_t split;
};

// min over i in [low, high] of done[i] + cost(i, at), the smallest such i. The arrays may be read kPad elements past
// their end.
inline Best best_split(const Prefix& p, const double* done, int64_t at, int64_t low, int64_t high) {
    const double e0 = p.p0[at], e1 = p.p1[at], e2 = p.p2[at];
    Best best{__builtin_inf(), low};
    if (high - low < kDoubles / 2) {
        for (int64_t i = low; i <= high; ++i) {
            const double s0 = e0 - p.p0[i], s1 = e1 - p.p1[i], s2 = e2 - p.p2[i];
            const double part = s2 - (s0 > 0.0 ? s1 * s1 / s0 : 0.0), value = done[i] + (part > 0.0 ? part : 0.0);
            best.split = value < best.value ? i : best.split;
            best.value = value < best.value ? value : best.value;
        }
        return best;
    }
    const Doubles zero = {};
    Doubles value = zero + __builtin_inf(), index = zero, split;
    for (int lane = 0; lane < kDoubles; ++lane) index[lane] = static_cast<double>(low + lane);
    split = index;
    const double last = static_cast<double>(high), step = kDoubles;
    for (int64_t i = low; i <= high; i += kDoubles) {
        const Doubles s0 = e0 - *(const DoublesAt*)(p.p0 + i), s1 = e1 - *(const DoublesAt*)(p.p1 + i);
        const Doubles s2 = e2 - *(const DoublesAt*)(p.p2 + i), ratio = s1 * s1 / s0, part = s2 - (s0 > zero ? ratio : zero);
        const Doubles here = *(const DoublesAt*)(done + i) + (part > zero ? part : zero);
        const auto better = (here < value) & (index <= last);
        value = better ? here : value;
        split = better ? index : split;
        index += step;
    }
    for (int lane = 0; lane < kDoubles; ++lane)
        if (value[lane] < best.value || (value[lane] == best.value && split[lane] < best.split))
            best = {value[lane], static_cast<int64_t>(split[lane])};
    return best;
}

struct Leaf {
    Doubles value, split;
};

// The same for kDoubles neighbouring prefixes from at on, one a lane, over a common short range. A split past a lane's
// own prefix costs at least as much as the empty last cluster at its end, so it can only tie with a smaller split and
// needs no mask.
inline Leaf best_splits(const Prefix& p, const double* done, int64_t at, int64_t low, int64_t high) {
    const Doubles e0 = *(const DoublesAt*)(p.p0 + at), e1 = *(const DoublesAt*)(p.p1 + at), e2 = *(const DoublesAt*)(p.p2 + at), zero = {};
    Leaf best{zero + __builtin_inf(), zero};
    for (int64_t i = low; i <= high; ++i) {
        const Doubles s0 = e0 - p.p0[i], s1 = e1 - p.p1[i], s2 = e2 - p.p2[i];
        const Doubles ratio = s1 * s1 / s0, part = s2 - (s0 > zero ? ratio : zero), here = done[i] + (part > zero ? part : zero);
        const auto better = here < best.value;
        best.value = better ? here : best.value;
        best.split = better ? zero + static_cast<double>(i) : best.split;
    }
    return best;
}

struct Span {
    int64_t from, to, low, high;
};

// One more cluster for every prefix of p: next[j] and where its last cluster starts. Prefixes that cost more than limit
// become infinite. The best split is monotone in j (solve the middle, then both halves within the split found) and in
// the number of clusters (before: the previous layer's splits, or nullptr). Returns the longest finite prefix.
inline int64_t layer(const Prefix& p, const double* done, int64_t reach, double limit, const int32_t* before, double* next,
                     int32_t* split) {
    Span stack[64];
    int depth = 0;
    int64_t top = p.m;
    stack[depth++] = {0, p.m, 0, reach};
    while (depth > 0) {
        Span span = stack[--depth];
        if (span.from > top) continue;
        span.to = least(span.to, top);
        while (span.from <= span.to) {
            if (span.to - span.from < kDoubles && span.high - span.low < 4 * kDoubles) {
                const Leaf leaf = best_splits(p, done, span.from, span.low, least(span.high, span.to));
                for (int64_t lane = 0; lane <= span.to - span.from; ++lane) {
                    next[span.from + lane] = leaf.value[lane];
                    split[span.from + lane] = static_cast<int32_t>(leaf.split[lane]);
                    if (leaf.value[lane] > limit) top = least(top, span.from + lane - 1);
                }
                break;
            }
            const int64_t middle = (span.from + span.to) / 2;
            const int64_t high = least(span.high, middle), least_split = before && middle <= reach ? before[middle] : 0;
            const Best best = best_split(p, done, middle, least(most(span.low, least_split), high), high);
            next[middle] = best.value;
            split[middle] = static_cast<int32_t>(best.split);
            if (best.value > limit) {
                top = middle - 1;
            } else if (middle < span.to) {
                stack[depth++] = {middle + 1, span.to, best.split, span.high};
            }
            span.to = middle - 1;
            span.high = least(span.high, best.split);
        }
    }
    for (int64_t j = top + 1; j <= p.m + kPad; ++j) next[j] = __builtin_inf();
    return top;
}

struct Direction {
    Prefix prefix;
    double *done, *next;
    int32_t* splits;  // [layers, m + 1]
    int64_t reach;

    void run(int clusters, double limit) {
        const int64_t m = prefix.m;
        reach = m;
        for (int64_t j = m; j >= 0; --j) {
            done[j] = prefix.cost(0, j);
            if (done[j] > limit) reach = j - 1;
        }
        for (int64_t j = reach + 1; j <= m + kPad; ++j) done[j] = __builtin_inf();
        for (int k = 2; k <= clusters; ++k) {
            int32_t* split = splits + (k - 2) * (m + 1);
            reach = layer(prefix, done, reach, limit, k > 2 ? split - (m + 1) : nullptr, next, split);
            double* swap = done;
            done = next;
            next = swap;
        }
    }
};

struct Workspace {  // sizes for rows of n elements
    SortedRow row;
    int64_t* origin;    // position in the row where distinct value i starts; n at the end
    double* sums;       // six arrays of stride: prefix sums from the left, then from the right
    double* costs;      // four arrays of stride
    int32_t* splits;    // two directions of layers
    double* level;
    int64_t* bound;
    int64_t stride;
};

// Bounds by the dynamic program over layers of clusters, for any k and any ties. False: w.level holds Lloyd's result,
// which stands.
inline bool layered(Workspace& w, int k) {
    SortedRow& row = w.row;
    const int64_t m = row.distinct, n = row.n;
    lloyd(row, k, 100, w.level, w.bound);
    double limit = 0.0;
    for (int i = 0; i < k; ++i) limit += row.cost(w.bound[i], w.bound[i + 1]);
    // Slack for the rounding of the prefix sums: pruning must never reach the optimum itself.
    limit = limit * (1.0 + 1e-6) + 1e-12 * (row.p2[n] - row.p2[0]);
    double* s = w.sums;
    for (int64_t i = 0; i < m + 1 + kPad; ++i) {
        const int64_t right = i <= m ? w.origin[m - i] : 0;
        s[i + 3 * w.stride] = -row.p0[right];
        s[i + 4 * w.stride] = -row.p1[right];
        s[i + 5 * w.stride] = -row.p2[right];
    }
    const int ahead = (k + 1) / 2, behind = k - ahead;
    Direction forward{{s, s + w.stride, s + 2 * w.stride, m}, w.costs, w.costs + w.stride, w.splits, 0};
    Direction backward{{s + 3 * w.stride, s + 4 * w.stride, s + 5 * w.stride, m}, w.costs + 2 * w.stride, w.costs + 3 * w.stride,
                       w.splits + (ahead > 1 ? (ahead - 1) * (m + 1) : 0), 0};
    forward.run(ahead, limit);
    backward.run(behind, limit);
    double best = __builtin_inf();
    int64_t meet = -1;
    for (int64_t j = m - backward.reach; j <= forward.reach; ++j)
        if (forward.done[j] + backward.done[m - j] < best) {
            best = forward.done[j] + backward.done[m - j];
            meet = j;
        }
    if (meet < 0) return false;  // only rounding could prune everything
    w.bound[0] = 0;
    w.bound[k] = m;
    w.bound[ahead] = meet;
    for (int c = ahead; c >= 2; --c) w.bound[c - 1] = forward.splits[(c - 2) * (m + 1) + w.bound[c]];
    for (int c = behind; c >= 2; --c) w.bound[k - c + 1] = m - backward.splits[(c - 2) * (m + 1) + (m - w.bound[k - c])];
    return true;
}

// What one more cluster is worth at the optimum of many levels, where it costs (sum of the density)^3 / (12 k^2).
inline double worth_of_a_cluster(const SortedRow& row, int k) {
    double density[kStartBins], edge[kStartBins + 1], sum = 0.0;
    const int bins = level_density(row, edge, density);
    for (int b = 0; b < bins; ++b) sum += density[b];
    const double each = sum / k, worth = each * each * each / 6.0;
    return worth > 1e-200 * (row.p2[row.n] - row.p2[0]) ? worth : 0.0;
}

inline void optimal(Workspace& w, int k) {
    SortedRow& row = w.row;
    const int64_t m = row.distinct, n = row.n;
    if (m <= k || k == 1) return lloyd(row, k, 100, w.level, w.bound);
    int64_t at = 0;
    for (int64_t r = 0; r < n; ++r)
        if (r == 0 || row.value[r] != row.value[r - 1]) w.origin[at++] = r;
    w.origin[m] = n;
    double* s = w.sums;
    for (int64_t i = 0; i < m + 1 + kPad; ++i) {
        const int64_t left = i <= m ? w.origin[i] : n;
        s[i] = row.p0[left];
        s[i + w.stride] = row.p1[left];
        s[i + 2 * w.stride] = row.p2[left];
    }
    const Prefix prefix{s, s + w.stride, s + 2 * w.stride, m};
    const bool path = k >= kPathLevels && penalised_path(prefix, k, worth_of_a_cluster(row, k), w.costs, w.splits, w.bound);
    if (!path && !layered(w, k)) return;
    double last = 0.0;
    bool have = false;
    for (int c = 0; c < k; ++c) {
        const int64_t from = w.origin[w.bound[c]], to = w.origin[w.bound[c + 1]];
        if (to > from) {
            w.level[c] = last = row.centroid(from, to);
            for (int before = c - 1; !have && before >= 0; --before) w.level[before] = last;
            have = true;
        } else if (have) {
            w.level[c] = last;
        }
    }
}

bool kmeans_range(const KmeansArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t n = args.n, stride = n + 1 + kPad;
    const int k = args.levels, layers = args.iterations ? 0 : k;
    Buffer<uint64_t> keys(n), spare(n);
    Buffer<double> row(5 * stride), sums(args.iterations ? 0 : 6 * stride), costs(args.iterations ? 0 : 4 * stride), level(k);
    Buffer<int64_t> origin(n + 1), bound(k + 1);
    Buffer<int32_t> splits(layers * (n + 1) + kPad);
    if (!keys || !spare || !row || !sums || !costs || !level || !origin || !bound || !splits) return false;
    Workspace w{{n, row, row + stride, row + 2 * stride, row + 3 * stride, row + 4 * stride, 0.0, 0, keys, spare},
                origin, sums, costs, splits, level, bound, stride};
    for (int64_t r = begin; r < end; ++r) {
        w.row.build(args.weight + r * n, args.importance + (args.per_row ? r * n : 0));
        if (args.iterations) lloyd(w.row, k, args.iterations, level, bound);
        else optimal(w, k);
        args.objective[r] = w.row.finish(level, k, args.out + r * k);
    }
    return true;
}

}  // namespace
}  // namespace leangrid
