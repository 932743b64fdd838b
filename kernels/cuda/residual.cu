// y + bias + x of channels-last maps in one launch; residual.py states the launch shape.
// Compiled with SCALAR (Half, BFloat or float) and CHANNELS (a multiple of VECTOR) defined.

constexpr int THREADS = 256;
constexpr int VECTOR = 16 / (int)sizeof(SCALAR);      // numbers that one thread computes: 16 bytes, the widest load

struct alignas(16) Vector { SCALAR at[VECTOR]; };

// y, x and sum are `vectors` times 16 bytes, with the channels of a pixel side by side, so that a thread's bias is 16 bytes of
// `bias`. Summed in fp32, rounded once.
extern "C" __global__ void __launch_bounds__(THREADS) residual(
    const Vector* y, const SCALAR* bias, const Vector* x, int vectors, Vector* sum) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= vectors) return;
    const Vector a = y[i], b = x[i], c = *(const Vector*)(bias + i % (CHANNELS / VECTOR) * VECTOR);
    Vector s;
    for (int k = 0; k < VECTOR; ++k) round_to(s.at[k], to_float(a.at[k]) + to_float(c.at[k]) + to_float(b.at[k]));
    sum[i] = s;
}
