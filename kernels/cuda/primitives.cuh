// What the kernels need of the hardware, sm_80 and later: number formats, warp operations, tensor-core products.
// No CUDA header is included, so NVRTC needs none. A word is 32 bits of one channel: two 16-bit numbers, or one fp32.

using Word = unsigned;

struct Half { unsigned short bits; };
struct BFloat { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ inline float to_float(BFloat x) { return __uint_as_float((Word)x.bits << 16); }

__device__ inline void round_to(float& y, float x) { y = x; }
__device__ inline void round_to(Half& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline void round_to(BFloat& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

__device__ inline Word round_tf32(float x) { Word y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x)); return y; }

// 2^x to 2 ulp, in one instruction; exp(x) is 2^(x log2 e).
__device__ inline float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

__device__ inline float lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// d += a b: a is 16 x 8 words (row major), b is 8 words x 8 (column major), d is 16 x 8 floats. Lane 4 g + t holds
// a: words (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4); b: words (t, g) (t + 4, g); d: (g, 2 t) (g, 2 t + 1) and the same of row g + 8.
#define MMA(SHAPE, TYPE) \
    asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ inline void mma(Half, float (&d)[4], const Word (&a)[4], const Word (&b)[2]) { MMA("m16n8k16", "f16"); }
__device__ inline void mma(BFloat, float (&d)[4], const Word (&a)[4], const Word (&b)[2]) { MMA("m16n8k16", "bf16"); }
__device__ inline void mma(float, float (&d)[4], const Word (&a)[4], const Word (&b)[2]) { MMA("m16n8k8", "tf32"); }
#undef MMA

// The same over half the depth, 16-bit types only: a is 16 x 4 words, (g, t) (g + 8, t); b is 4 words x 8, (t, g).
#define MMA(TYPE) \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b))
__device__ inline void mma_short(Half, float (&d)[4], const Word (&a)[2], Word b) { MMA("f16"); }
__device__ inline void mma_short(BFloat, float (&d)[4], const Word (&a)[2], Word b) { MMA("bf16"); }
#undef MMA

// The same without a sum before it, which would take registers that are set to zero.
#define MMA(TYPE) \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};" \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.0f))
__device__ inline void product_short(Half, float (&d)[4], const Word (&a)[2], Word b) { MMA("f16"); }
__device__ inline void product_short(BFloat, float (&d)[4], const Word (&a)[2], Word b) { MMA("bf16"); }
#undef MMA

// Two numbers rounded to 16 bits in one instruction, which is two conversions and a shift less than pack().
__device__ inline Word round_pair(Half, float low, float high) { Word y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
__device__ inline Word round_pair(BFloat, float low, float high) { Word y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }

// Whether any lane of the warp says yes.
__device__ inline bool warp_any(bool yes) { return __any_sync(0xffffffffu, yes); }

// Copy 16 bytes to shared memory without waiting; await_copies waits for the thread's own, and a barrier then for all threads'.
__device__ inline void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"((Word)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory, transposed: lane 8 i + j passes row j of matrix i, which is 16 bytes, and
// lane 4 g + t gets the numbers (2 t, g), (2 t + 1, g) of each. That is how a factor kept row by row becomes the right one of mma.
__device__ inline void load_transposed(Word (&x)[4], const Word* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"((Word)__cvta_generic_to_shared(row)) : "memory");
}
