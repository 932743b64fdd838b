// Runs the kernels' own source on the CPU: one fiber for each CUDA thread of a block, blocks one after another.
// A warp runs until all its threads wait for the block, then the next does: a missing barrier meets the largest possible
// skew. The order of the warps, and of the threads in a warp, is drawn from a seed: a race moves the result.
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
using Word = unsigned;

struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }

namespace emulation {

constexpr unsigned STACK = 64 * 1024, WARP = 32, MOST_WARPS = 8, MOST_THREADS = WARP * MOST_WARPS;

struct Barrier { unsigned arrived = 0, generation = 0; };

struct Fiber {
    ucontext_t start;
    jmp_buf state;
    bool started, done, waiting;       // waiting: for the whole block, since `generation`
    unsigned generation;
    struct { void* to; const void* from; } copies[4];   // asynchronous ones that were not waited for
    unsigned copying;
    alignas(64) char stack[STACK];
};

static Fiber fibers[MOST_THREADS];
static jmp_buf scheduler;
static unsigned current;
static Barrier block_barrier, warp_barriers[MOST_WARPS];
static Word exchange[8 * MOST_THREADS];
static void (*body)(void*);
static void* arguments;
static unsigned random_state;
static bool late_copies;   // asynchronous copies are made when they are waited for, not at once

inline unsigned random() { return (random_state = random_state * 1664525u + 1013904223u) >> 8; }

template <unsigned SIZE> void shuffle(unsigned (&order)[SIZE], unsigned count) {
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    for (unsigned i = count; i > 1 && random_state; --i) {
        const unsigned j = random() % i, kept = order[j];
        order[j] = order[i - 1];
        order[i - 1] = kept;
    }
}

// The running fiber stops here until its turn comes again.
inline void yield() {
    if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned members) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) yield();
}

inline void warp_wait() { wait(warp_barriers[current / WARP], WARP); }

inline void block_wait() {
    fibers[current].waiting = true;
    fibers[current].generation = block_barrier.generation;
    wait(block_barrier, blockDim.x);
    fibers[current].waiting = false;
}

static void enter() {
    body(arguments);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

// Runs a fiber until it yields or returns.
static void resume(unsigned thread) {
    current = thread;
    threadIdx = {thread, 0, 0};
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
}

// Runs a warp's fibers, in an order drawn each time, until all of them have returned or wait for the block.
static bool run_warp(unsigned warp) {
    bool any = false, moved = true;
    while (moved) {
        moved = false;
        unsigned order[WARP];
        shuffle(order, WARP);
        for (unsigned lane : order) {
            const Fiber& fiber = fibers[warp * WARP + lane];
            if (fiber.done || (fiber.waiting && fiber.generation == block_barrier.generation)) continue;
            resume(warp * WARP + lane);
            any = moved = true;
        }
    }
    return any;
}

static void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].started = fibers[i].done = fibers[i].waiting = false;
        fibers[i].copying = 0;
    }
    block_barrier = {};
    for (Barrier& barrier : warp_barriers) barrier = {};
    for (bool any = true; any;) {
        any = false;
        unsigned order[MOST_WARPS];
        shuffle(order, threads / WARP);
        for (unsigned i = 0; i < threads / WARP; ++i) any |= run_warp(order[i]);
    }
}

// Threads in whole warps. Every thread of a block must reach the same barriers.
template <typename Kernel> void launch(dim3 grid, unsigned threads, unsigned seed, Kernel kernel) {
    arguments = &kernel;
    body = [](void* k) { (*static_cast<Kernel*>(k))(); };
    gridDim = grid;
    blockDim = {threads, 1, 1};
    random_state = seed;
    late_copies = seed % 2;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
}

inline Word* words_of(unsigned lane) { return &exchange[8 * (current / WARP * WARP + lane)]; }

}  // namespace emulation

inline void __syncthreads() { emulation::block_wait(); }
inline void __threadfence() {}
inline int atomicAdd(int* at, int value) { return (*at += value) - value; }
inline Word __float_as_uint(float x) { Word y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(Word x) { float y; memcpy(&y, &x, 4); return y; }

// primitives.cuh, on the CPU.
struct Half { unsigned short bits; };
struct BFloat { unsigned short bits; };

inline float to_float(float x) { return x; }
inline float to_float(Half x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
inline float to_float(BFloat x) { return __uint_as_float((Word)x.bits << 16); }
inline void round_to(float& y, float x) { y = x; }
inline void round_to(Half& y, float x) { const _Float16 z = (_Float16)x; memcpy(&y, &z, 2); }
inline void round_to(BFloat& y, float x) {
    const Word bits = __float_as_uint(x);
    y.bits = isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline Word round_tf32(float x) { return isfinite(x) ? (__float_as_uint(x) + 0x1000) & ~0x1fffu : __float_as_uint(x); }
inline float exp2_fast(float x) { return x < -126 ? 0 : exp2f(x); }

inline float lane_xor(float x, int mask) {
    using namespace emulation;
    const unsigned lane = current % WARP;
    words_of(lane)[0] = __float_as_uint(x);
    warp_wait();
    const float y = __uint_as_float(words_of(lane ^ mask)[0]);
    warp_wait();
    return y;
}

inline void load_transposed(Word (&x)[4], const Word* row) {
    using namespace emulation;
    const unsigned lane = current % WARP, g = lane / 4, t = lane % 4;
    memcpy(words_of(lane), row, 16);
    warp_wait();
    for (int i = 0; i < 4; ++i) {
        const auto number = [&](unsigned r) { return words_of(8 * i + r)[g / 2] >> 16 * (g % 2) & 0xffff; };
        x[i] = number(2 * t) | number(2 * t + 1) << 16;
    }
    warp_wait();
}

inline bool warp_any(bool yes) {
    using namespace emulation;
    words_of(current % WARP)[0] = yes;
    warp_wait();
    bool any = false;
    for (unsigned lane = 0; lane < WARP; ++lane) any |= words_of(lane)[0];
    warp_wait();
    return any;
}

inline void copy_async(void* to, const void* from) {
    emulation::Fiber& fiber = emulation::fibers[emulation::current];
    if (emulation::late_copies) fiber.copies[fiber.copying++] = {to, from};
    else memcpy(to, from, 16);
}
inline void await_copies() {
    emulation::Fiber& fiber = emulation::fibers[emulation::current];
    while (fiber.copying) {
        --fiber.copying;
        memcpy(fiber.copies[fiber.copying].to, fiber.copies[fiber.copying].from, 16);
    }
}

template <typename T> Word round_pair(T, float low, float high) {
    T a, b;
    round_to(a, low);
    round_to(b, high);
    return (Word)a.bits | (Word)b.bits << 16;
}

inline float part(Half, Word w, int i) { return to_float(Half{(unsigned short)(w >> 16 * i)}); }
inline float part(BFloat, Word w, int i) { return to_float(BFloat{(unsigned short)(w >> 16 * i)}); }
inline float part(float, Word w, int) { return __uint_as_float(w & ~0x1fffu); }

// d += a b over `depth` words, the fragments laid out over the warp as primitives.cuh says.
template <typename T> void product_of_fragments(float (&d)[4], const Word* a, const Word* b, int depth) {
    using namespace emulation;
    const unsigned lane = current % WARP, g = lane / 4, t = lane % 4;
    memcpy(words_of(lane), a, depth / 2 * sizeof(Word));
    memcpy(words_of(lane) + 4, b, depth / 4 * sizeof(Word));
    warp_wait();
    for (int i = 0; i < 4; ++i) {
        const unsigned column = 2 * t + i % 2;
        for (int w = 0; w < depth; ++w)
            for (unsigned k = 0; k < 4 / sizeof(T); ++k)
                d[i] += part(T(), words_of(4 * g + w % 4)[i / 2 + 2 * (w / 4)], k) * part(T(), words_of(4 * column + w % 4)[4 + w / 4], k);
    }
    warp_wait();
}
template <typename T> void mma(T, float (&d)[4], const Word (&a)[4], const Word (&b)[2]) { product_of_fragments<T>(d, a, b, 8); }
template <typename T> void mma_short(T, float (&d)[4], const Word (&a)[2], Word b) { product_of_fragments<T>(d, a, &b, 4); }
template <typename T> void product_short(T, float (&d)[4], const Word (&a)[2], Word b) {
    for (float& x : d) x = 0;
    mma_short(T(), d, a, b);
}
