// Loops over the caller's threads, and the choice of element type.
#pragma once

#include "problem.h"
#include "simd.h"

namespace skink::SKINK_ISA {

// Calls body(worker) for each of `workers` on the pool, or here when there is one.
template <typename Body>
inline void run_workers(const Pool& pool, int workers, const Body& body) {
    if (workers <= 1) {
        body(0);
        return;
    }
    auto call = [](void* context, int worker) { (*static_cast<const Body*>(context))(worker); };
    pool.run(workers, call, const_cast<Body*>(&body));
}

// Calls body(begin, end) on equal slices of [0, count), none with fewer than `grain`.
template <typename Body>
inline void parallel_for(const Pool& pool, int64_t count, int64_t grain, const Body& body) {
    const int workers = static_cast<int>(max(1, min(pool.threads, count / max(1, grain))));
    run_workers(pool, workers, [&](int worker) { body(count * worker / workers, count * (worker + 1) / workers); });
}

// Calls body with a value of the storage type.
template <typename Body>
inline void with_type(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::float32:
            return body(float{});
        case Dtype::bfloat16:
            return body(BFloat16{});
        case Dtype::float16:
            return body(Float16{});
    }
}

}  // namespace skink::SKINK_ISA
