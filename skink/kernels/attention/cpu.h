// Softmax attention for decoding and short prompts. Meaning: reference.py.
//
// The keys and values of one head are read from memory once and serve every query that needs them: all query heads of
// the group and all tokens. A tile is up to 64 such queries ("rows", ordered by token, then by head of the group). Keys
// go by in blocks; each row keeps its running maximum, sum and weighted values (online softmax: Milakov & Gimelshein
// 2018, arXiv 1805.02867), in float32 whatever the storage type. Where there are fewer tiles than threads and many
// keys, the keys are split and the parts merged (Flash-Decoding, Dao et al. 2023).
//
// Cost: keys * (width + value_width) elements of memory for each key head and tile; per key and row width + value_width
// multiply-adds.
#pragma once

#include "skink/kernels/cpp/parallel.h"
#include "skink/kernels/cpp/products.h"

namespace skink::SKINK_ISA {

constexpr int64_t kTileRows = 64;
constexpr int64_t kBlock = 128;  // keys at a time: their scores and values stay in the nearer caches
constexpr float kNone = -__builtin_inff();

// total[r] = total[r] * keep[r] + sum over j of weights[r * kBlock + j] * value[j], on `Columns` vectors of the values'
// width: whole steps, or where there is one column the last `left` elements.
template <typename T, int Rows, int Columns>
inline void add_values(const float* weights, const float* keep, const T* value, int64_t value_stride, int64_t n,
                       int64_t ahead, float* total, int64_t total_stride, int64_t left) {
    Vec sums[Rows][Columns];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) sums[r][c] = load(total + r * total_stride + c * kLanes) * keep[r];
    for (int64_t j = 0; j < n; ++j) {
        Vec x[Columns];
        const T* at = value + j * value_stride;
        if constexpr (Columns == 1) {
            x[0] = load_some(at, left);
            __builtin_prefetch(at + ahead, 0, 2);
        } else {
#pragma GCC unroll 16
            for (int c = 0; c < Columns; c += kStep<T>) {
                load_step(at + c * kLanes, x + c);
                if (c * kLanes % (64 / sizeof(T)) == 0) __builtin_prefetch(at + c * kLanes + ahead, 0, 2);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec weight = splat(weights[r * kBlock + j]);
#pragma GCC unroll 16
            for (int c = 0; c < Columns; ++c) sums[r][c] += weight * x[c];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) store(total + r * total_stride + c * kLanes, sums[r][c]);
}

template <typename T, int Rows>
inline void add_values_all(const float* weights, const float* keep, const T* value, int64_t value_stride, int64_t n,
                           int64_t width, int64_t ahead, float* total, int64_t total_stride) {
    // As many sums as registers allow beside the values and the weight.
    constexpr int kMost = kRegisters / 2 / Rows > 8 ? 8 : kRegisters / 2 / Rows;
    int64_t d = 0;
    for (; d + kMost * kLanes <= width; d += kMost * kLanes)
        add_values<T, Rows, kMost>(weights, keep, value + d, value_stride, n, ahead, total + d, total_stride, 0);
    if constexpr (kMost > 4)
        for (; d + 4 * kLanes <= width; d += 4 * kLanes)
            add_values<T, Rows, 4>(weights, keep, value + d, value_stride, n, ahead, total + d, total_stride, 0);
    for (; d + 2 * kLanes <= width; d += 2 * kLanes)
        add_values<T, Rows, 2>(weights, keep, value + d, value_stride, n, ahead, total + d, total_stride, 0);
    for (; d < width; d += kLanes)
        add_values<T, Rows, 1>(weights, keep, value + d, value_stride, n, ahead, total + d, total_stride, width - d);
}

// How the work is cut, and where each part of the scratch memory begins (in floats).
struct AttentionPlan {
    int64_t group, rows, tile_rows, tiles, splits, units, tasks;
    int64_t query_width, value_width;  // in scratch, rounded up to whole vectors
    int64_t state_size;                // of one tile's running maxima, sums and weighted values
    int64_t worker_size, states, counters, total;
    int workers;
};

inline AttentionPlan plan_attention(const Attention& p, const Pool& pool) {
    constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds; below this, waking a thread costs more than it saves
    constexpr int64_t kKeysPerSplit = 256;
    AttentionPlan plan;
    plan.group = p.heads / max(1, p.key_heads);
    plan.rows = plan.group * p.tokens;
    plan.tiles = ceil_div(plan.rows, kTileRows);
    plan.tile_rows = round_up(ceil_div(plan.rows, max(1, plan.tiles)), 4);
    plan.units = p.batch * p.key_heads * plan.tiles;
    const int64_t tile_tokens = ceil_div(plan.tile_rows, max(1, plan.group)) + 1;
    const int64_t span = p.window > 0 && p.causal ? min(p.keys, p.window + tile_tokens) : p.keys;
    const int64_t work = p.batch * p.heads * p.tokens * span * (p.width + p.value_width);
    plan.workers = static_cast<int>(max(1, min(pool.threads, work / kWorkPerThread)));
    plan.splits = 1;
    if (plan.workers > 1 && plan.units > 0 && plan.units < 4 * plan.workers && plan.units % plan.workers != 0)
        plan.splits = max(1, min(ceil_div(4 * plan.workers, plan.units), span / kKeysPerSplit));
    plan.tasks = plan.units * plan.splits;
    plan.workers = static_cast<int>(max(1, min(plan.workers, plan.tasks)));

    plan.query_width = round_up(p.width, 16);
    plan.value_width = round_up(p.value_width, 16);
    plan.state_size = plan.tile_rows * (plan.value_width + 2);
    plan.state_size = round_up(plan.state_size, 16);
    const int64_t scores = kTileRows * kBlock;
    plan.worker_size = round_up(plan.tile_rows * plan.query_width + scores + 2 * kBlock + plan.value_width, 16);
    plan.states = plan.workers * plan.worker_size;
    plan.counters = plan.states + (plan.splits > 1 ? plan.tasks : plan.workers) * plan.state_size;
    plan.total = plan.counters + (plan.splits > 1 ? plan.units : 0) + 16;
    return plan;
}

inline size_t attention_scratch(const Attention& p, const Pool& pool) {
    return static_cast<size_t>(plan_attention(p, pool).total) * sizeof(float);
}

// A row's state over the keys seen so far: the weights are relative to exp(top).
struct AttentionState {
    float* top;     // [tile_rows], minus infinity while nothing was allowed
    float* sum;     // [tile_rows], of the weights
    float* values;  // [tile_rows, plan.value_width], weighted sums

    AttentionState(const AttentionPlan& plan, float* memory)
        : top(memory), sum(memory + plan.tile_rows), values(memory + 2 * plan.tile_rows) {}
};

// One tile of queries against a range of keys.
template <typename T>
class AttentionTile {
public:
    AttentionTile(const Attention& p, const AttentionPlan& plan, float* scratch, int64_t unit)
        : p(p), plan(plan), batch(unit / plan.tiles / p.key_heads), key_head(unit / plan.tiles % p.key_heads),
          first(unit % plan.tiles * plan.tile_rows), count(min(plan.tile_rows, plan.rows - first)), query(scratch),
          scores(query + plan.tile_rows * plan.query_width), keep(scores + kTileRows * kBlock), present(keep + kBlock),
          mean(present + kBlock), key(static_cast<const T*>(p.key) + batch * p.key_batch + key_head * p.key_head),
          value(static_cast<const T*>(p.value) + batch * p.value_batch + key_head * p.value_head),
          mask(p.key_mask == nullptr ? nullptr : p.key_mask + batch * p.mask_batch) {}

    // Part `split` of the keys that any row of the tile may see.
    void run(int64_t split, AttentionState state) {
        load_queries();
        for (int64_t r = 0; r < count; ++r) {
            state.top[r] = kNone;
            state.sum[r] = 0;
        }
        memset(state.values, 0, static_cast<size_t>(plan.tile_rows * plan.value_width) * sizeof(float));
        const int64_t low = lowest_key(0), high = max(low, highest_key(count - 1));
        const int64_t begin = low + (high - low) * split / plan.splits;
        const int64_t end = low + (high - low) * (split + 1) / plan.splits;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int64_t n = min(kBlock, end - at);
            if (mask != nullptr && memchr(mask + at, 1, static_cast<size_t>(n)) == nullptr) continue;
            const bool last = at + n == end;
            score_block(at, n, last);
            read_mask(at, n);
            for (int64_t r = 0; r < count; ++r) weigh_row(r, at, n, state);
            add_block(at, n, last, state);
        }
    }

    // Merges the parts' states and writes the rows' results.
    void finish(float* states) {
        AttentionState whole(plan, states);
        bool mean_known = false;
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t split = 1; split < plan.splits; ++split)
                merge_row(r, whole, AttentionState(plan, states + split * plan.state_size));
            const int64_t head = key_head * plan.group + (first + r) % plan.group;
            const int64_t token = (first + r) / plan.group;
            const float sink = p.sinks == nullptr ? kNone : p.sinks[head];
            float* values = whole.values + r * plan.value_width;
            float factor;
            if (whole.top[r] == kNone) {
                // Nothing was allowed: all keys weigh the same, or nothing at all beside a sink.
                if (!mean_known) average_values();
                mean_known = true;
                values = mean;
                factor = sink == kNone ? 1.0f : 0.0f;
            } else if (sink > whole.top[r]) {
                const float less = exp(splat(whole.top[r] - sink))[0];
                factor = less / (whole.sum[r] * less + 1.0f);
            } else {
                factor = 1.0f / (whole.sum[r] + exp(splat(sink - whole.top[r]))[0]);
            }
            T* out = static_cast<T*>(p.output) + ((batch * p.heads + head) * p.tokens + token) * p.value_width;
            int64_t d = 0;
            for (; d + kStep<T> * kLanes <= p.value_width; d += kStep<T> * kLanes) {
                Vec x[kStep<T>];
                for (int s = 0; s < kStep<T>; ++s) x[s] = load(values + d + s * kLanes) * factor;
                store_step(out + d, x);
            }
            for (; d < p.value_width; d += kLanes) store_some(out + d, load(values + d) * factor, p.value_width - d);
        }
    }

private:
    const Attention& p;
    const AttentionPlan& plan;
    const int64_t batch, key_head, first, count;
    float* const query;    // [tile_rows, plan.query_width], times the scale
    float* const scores;   // [kTileRows, kBlock], then the weights
    float* const keep;     // [tile_rows], what is left of the sums so far when a row's maximum grows
    float* const present;  // [kBlock], 0 for padding
    float* const mean;     // [plan.value_width]
    const T* const key;
    const T* const value;
    const uint8_t* const mask;

    int64_t position(int64_t row) const { return p.keys - p.tokens + (first + row) / plan.group; }
    int64_t lowest_key(int64_t row) const { return p.window > 0 ? max(0, position(row) - p.window + 1) : 0; }
    int64_t highest_key(int64_t row) const { return p.causal ? position(row) + 1 : p.keys; }  // exclusive

    void load_queries() {
        for (int64_t r = 0; r < count; ++r) {
            float* to = query + r * plan.query_width;
            const int64_t row = first + r;
            const int64_t head = key_head * plan.group + row % plan.group;
            const T* from = static_cast<const T*>(p.query) + batch * p.query_batch + head * p.query_head +
                            row / plan.group * p.query_token;
            for_each_vector(from, p.width, [&](int64_t d, Vec x) { store(to + d, x * p.scale); });
        }
    }

    void score_block(int64_t at, int64_t n, bool last) {
        const T* k = key + at * p.key_token;
        const int64_t width = plan.query_width;
        int64_t ahead = last ? 0 : kBlock * p.key_token;
        int64_t r = 0;
        for (; r + 4 <= count; r += 4, ahead = 0)
            products<T, 4>(query + r * width, width, k, p.key_token, p.width, n, ahead, block(r), kBlock);
        if (count - r >= 2) {
            products<T, 2>(query + r * width, width, k, p.key_token, p.width, n, ahead, block(r), kBlock);
            r += 2;
            ahead = 0;
        }
        if (r < count) products<T, 1>(query + r * width, width, k, p.key_token, p.width, n, ahead, block(r), kBlock);
    }

    void add_block(int64_t at, int64_t n, bool last, AttentionState state) {
        const T* v = value + at * p.value_token;
        const int64_t width = plan.value_width;
        int64_t ahead = last ? 0 : kBlock * p.value_token;
        int64_t r = 0;
        float* total = state.values;
        for (; r + 4 <= count; r += 4, total += 4 * width, ahead = 0)
            add_values_all<T, 4>(block(r), keep + r, v, p.value_token, n, p.value_width, ahead, total, width);
        if (count - r >= 2) {
            add_values_all<T, 2>(block(r), keep + r, v, p.value_token, n, p.value_width, ahead, total, width);
            r += 2;
            total += 2 * width;
            ahead = 0;
        }
        if (r < count)
            add_values_all<T, 1>(block(r), keep + r, v, p.value_token, n, p.value_width, ahead, total, width);
    }

    void read_mask(int64_t at, int64_t n) {
        if (mask == nullptr) return;
        for (int64_t i = 0; i < n; ++i) present[i] = mask[at + i] != 0 ? 1.0f : 0.0f;
    }

    // Turns a row's scores into weights, and its state into one that counts them.
    void weigh_row(int64_t r, int64_t at, int64_t n, AttentionState state) {
        float* x = block(r);
        const int64_t padded = round_up(n, kLanes);
        const int64_t low = min(n, max(0, lowest_key(r) - at)), high = max(low, min(n, highest_key(r) - at));
        if (p.softcap != 0.0f)
            for (int64_t i = 0; i < n; i += kLanes) store(x + i, tanh(load(x + i) * (1.0f / p.softcap)) * p.softcap);
        if (p.alibi != nullptr) {
            const float slope = p.alibi[key_head * plan.group + (first + r) % plan.group];
            const int64_t ahead = at - position(r);
            for (int64_t i = 0; i < n; ++i) x[i] += slope * static_cast<float>(ahead + i);
        }
        for (int64_t i = 0; i < low; ++i) x[i] = kNone;
        for (int64_t i = high; i < padded; ++i) x[i] = kNone;
        Vec tops = splat(kNone);
        VecI broken = {};
        for (int64_t i = 0; i < n; i += kLanes) {
            Vec score = load(x + i);
            if (mask != nullptr) {
                score = select(load(present + i) != 0.0f, score, splat(kNone));
                store(x + i, score);
            }
            broken |= score != score;
            tops = select(score > tops, score, tops);
        }
        float block_top = largest(tops);
        if (any(broken)) block_top = __builtin_nanf("");
        keep[r] = 1.0f;
        if (block_top == kNone) {
            memset(x, 0, static_cast<size_t>(n) * sizeof(float));
            return;
        }
        const float top = block_top < state.top[r] ? state.top[r] : block_top;
        keep[r] = exp(splat(state.top[r] - top))[0];
        Vec sums = {};
        for (int64_t i = 0; i < n; i += kLanes) {
            const Vec weight = exp(load(x + i) - top);
            store(x + i, weight);
            sums += weight;
        }
        state.sum[r] = state.sum[r] * keep[r] + sum(sums);
        state.top[r] = top;
    }

    void merge_row(int64_t r, AttentionState to, AttentionState from) {
        if (from.top[r] == kNone) return;
        const float top = from.top[r] < to.top[r] ? to.top[r] : from.top[r];
        const float to_factor = exp(splat(to.top[r] - top))[0], from_factor = exp(splat(from.top[r] - top))[0];
        float* a = to.values + r * plan.value_width;
        const float* b = from.values + r * plan.value_width;
        for (int64_t d = 0; d < plan.value_width; d += kLanes)
            store(a + d, load(a + d) * to_factor + load(b + d) * from_factor);
        to.sum[r] = to.sum[r] * to_factor + from.sum[r] * from_factor;
        to.top[r] = top;
    }

    void average_values() {
        memset(mean, 0, static_cast<size_t>(plan.value_width) * sizeof(float));
        for (int64_t j = 0; j < p.keys; ++j)
            for_each_vector(value + j * p.value_token, p.value_width,
                            [&](int64_t d, Vec x) { store(mean + d, load(mean + d) + x); });
        const float share = 1.0f / static_cast<float>(p.keys);
        for (int64_t d = 0; d < p.value_width; d += kLanes) store(mean + d, load(mean + d) * share);
    }

    float* block(int64_t r) const { return scores + r * kBlock; }

    static bool any(VecI condition) {
        int32_t bits = 0;
        for (int i = 0; i < kLanes; ++i) bits |= condition[i];
        return bits != 0;
    }
};

template <typename T>
inline void attention_of(const Attention& p, const AttentionPlan& plan, const Pool& pool, float* scratch) {
    int32_t* done = reinterpret_cast<int32_t*>(scratch + plan.counters);
    if (plan.splits > 1) memset(done, 0, static_cast<size_t>(plan.units) * sizeof(int32_t));
    int64_t next = 0;
    // Tasks are taken one by one, so that a thread that is held up does not hold up the rest.
    run_workers(pool, plan.workers, [&](int worker) {
        float* own = scratch + worker * plan.worker_size;
        for (;;) {
            const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= plan.tasks) return;
            const int64_t unit = task / plan.splits;
            AttentionTile<T> tile(p, plan, own, unit);
            if (plan.splits == 1) {
                float* state = scratch + plan.states + worker * plan.state_size;
                tile.run(0, AttentionState(plan, state));
                tile.finish(state);
                continue;
            }
            float* states = scratch + plan.states + unit * plan.splits * plan.state_size;
            const int64_t split = task % plan.splits;
            tile.run(split, AttentionState(plan, states + split * plan.state_size));
            // Whoever completes the last part of a tile merges them.
            if (__atomic_add_fetch(done + unit, 1, __ATOMIC_ACQ_REL) == plan.splits) tile.finish(states);
        }
    });
}

inline void attention(const Attention& p, const Pool& pool, void* scratch) {
    const AttentionPlan plan = plan_attention(p, pool);
    if (plan.tasks == 0 || p.value_width == 0) return;
    with_type(p.dtype, [&](auto type) { attention_of<decltype(type)>(p, plan, pool, static_cast<float*>(scratch)); });
}

}  // namespace skink::SKINK_ISA
