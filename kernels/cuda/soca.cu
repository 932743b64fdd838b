// Second-order channel attention in two launches; soca.py states the formulas and the launch shapes.
// Compiled with SCALAR (Half, BFloat or float: the map's type) and CHANNELS (16, 32, 48 or 64) defined.

constexpr int C = CHANNELS;
constexpr int THREADS = 4 * C;                    // soca_statistics: one thread per 8 channels and word of a tile
constexpr int WORDS = 32;                         // of each channel in a tile
constexpr int PIXELS = 4 / (int)sizeof(SCALAR);   // in a word
constexpr int TILE = WORDS * PIXELS;              // pixels
constexpr int STRIPS = C / 16;                    // 8-wide output columns that one warp holds
constexpr int PARTIAL = C * C + C + 4;            // floats: a block's scatter about its mean, the mean, the number of pixels
constexpr int GATE_THREADS = 256;
constexpr float MIN_TRACE = 1e-10f;

__device__ inline int tile_count(int pixels) { return (pixels + TILE - 1) / TILE; }
__device__ inline int first_tile(int block, int blocks, int pixels) { return (int)((long long)tile_count(pixels) * block / blocks); }

// Where a tile keeps word w of channel c: spread so that neither the stores nor the fragment loads meet in a bank.
__device__ inline int slot(int c, int w) { return c * WORDS + (w ^ (((c ^ c >> 3) & 7) * 4)); }

// This thread's part of a tile: 8 channels of one word.
struct Part { SCALAR value[8][PIXELS]; };

template <bool CHANNELS_LAST> __device__ inline void load(Part& part, const SCALAR* map, int pixels, int first, int channel) {
    struct alignas(16) Eight { SCALAR value[8]; };
    struct alignas(4) Packed { SCALAR value[PIXELS]; };
#pragma unroll
    for (int j = 0; j < PIXELS; ++j) {
        const int pixel = first + j;
        if constexpr (CHANNELS_LAST) {
            Eight eight = {};
            if (pixel < pixels) eight = *(const Eight*)(map + (size_t)pixel * C + channel);
            for (int i = 0; i < 8; ++i) part.value[i][j] = eight.value[i];
        } else if (pixels % PIXELS) {
            for (int i = 0; i < 8; ++i) part.value[i][j] = pixel < pixels ? map[(size_t)(channel + i) * pixels + pixel] : SCALAR{};
        } else if (j == 0) {
            for (int i = 0; i < 8; ++i) {
                Packed packed = {};
                if (pixel < pixels) packed = *(const Packed*)(map + (size_t)(channel + i) * pixels + pixel);
                for (int k = 0; k < PIXELS; ++k) part.value[i][k] = packed.value[k];
            }
        }
    }
}

// Sums over the words of a tile what each thread has of its 8 channels; total[c] is written and visible to all on return.
__device__ inline void sum_words(const float (&own)[8], float* scratch, float* total, int channel, int word) {
    __syncthreads();
    for (int i = 0; i < 8; ++i) scratch[(channel + i) * (WORDS + 1) + word] = own[i];
    __syncthreads();
    if (threadIdx.x < C) {
        float sum = 0;
        for (int w = 0; w < WORDS; ++w) sum += scratch[threadIdx.x * (WORDS + 1) + w];
        total[threadIdx.x] = sum;
    }
    __syncthreads();
}

// Chan's formula over rows of partials: sum of scatters + sum of n (mean_b - mean)(mean_b - mean)^T, of which each of the T threads
// gets every T-th element; `mean`, if any, is written. Returns the number of pixels. The last row must not be empty.
template <int T> __device__ inline float merge(const float* rows, int count, float* spread, float (&sum)[C * C / T], float* mean) {
    const int thread = threadIdx.x;
    const float* const counts = rows + C * C + C;
    float pixels = 0;
    for (int b = 0; b < count; ++b) pixels += counts[(size_t)b * PARTIAL];
    if (thread < C) {
        const float* const means = rows + C * C + thread;
        const float origin = means[(size_t)(count - 1) * PARTIAL];
        float offset = 0;
        for (int b = 0; b < count; ++b) {
            const float n = counts[(size_t)b * PARTIAL];
            spread[b * C + thread] = n > 0 ? means[(size_t)b * PARTIAL] - origin : 0;
            offset += n * spread[b * C + thread];
        }
        offset /= pixels;
        for (int b = 0; b < count; ++b) spread[b * C + thread] -= offset;
        if (mean) mean[thread] = origin + offset;
    }
    __syncthreads();
    for (float& x : sum) x = 0;
    for (int b = 0; b < count; ++b) {
        const float n = counts[(size_t)b * PARTIAL];
        for (int e = 0; e < C * C / T; ++e) {
            const int at = e * T + thread;
            sum[e] += rows[(size_t)b * PARTIAL + at] + n * spread[b * C + at / C] * spread[b * C + at % C];
        }
    }
    return pixels;
}

// The last block of a group to come here merges the group's rows into one behind all of them: soca_gate then reads few.
__device__ inline void merge_group(float* rows, int group, int* counters, float* spread) {
    __shared__ bool last;
    const int blocks = gridDim.x, index = blockIdx.x / group;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counters + blockIdx.y * (blocks / group) + index, 1) == group - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    float* const merged = rows + (size_t)(blocks + index) * PARTIAL;
    float sum[C * C / THREADS];
    const float pixels = merge<THREADS>(rows + (size_t)index * group * PARTIAL, group, spread, sum, merged + C * C);
    for (int e = 0; e < C * C / THREADS; ++e) merged[e * THREADS + threadIdx.x] = sum[e];
    if (threadIdx.x == 0) merged[C * C + C] = pixels;
}

template <bool CHANNELS_LAST>
__device__ inline void statistics(const SCALAR* maps, int pixels, int group, float* partials, int* counters) {
    alignas(16) __shared__ Word tiles[2][2][C * WORDS];
    __shared__ float shift[C], total[C];
    float* const scratch = (float*)tiles;
    const int blocks = gridDim.x, block = blockIdx.x, thread = threadIdx.x;
    const int channel = 8 * (CHANNELS_LAST ? thread % (C / 8) : thread / WORDS);
    const int word = CHANNELS_LAST ? thread / (C / 8) : thread % WORDS;
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const int row = 16 * (warp / 2) + g, column = 8 * STRIPS * (warp % 2) + g;
    const SCALAR* const map = maps + (size_t)blockIdx.y * C * pixels;
    const int begin = first_tile(block, blocks, pixels), end = first_tile(block + 1, blocks, pixels);
    const int count = min(end * TILE, pixels) - min(begin * TILE, pixels);

    Part part;
    float sum[8] = {};
    load<CHANNELS_LAST>(part, map, begin < end ? pixels : 0, begin * TILE + word * PIXELS, channel);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < PIXELS; ++j) sum[i] += to_float(part.value[i][j]);
    sum_words(sum, scratch, total, channel, word);
    // Data are taken relative to the mean of the block's first tile: large means then cancel before they are squared.
    if (thread < C) {
        SCALAR mean;
        round_to(mean, total[thread] / max(min(count, TILE), 1));
        shift[thread] = to_float(mean);
    }
    __syncthreads();

    float d[STRIPS][4] = {};
    for (int i = 0; i < 8; ++i) sum[i] = 0;
    for (int tile = begin; tile < end; ++tile) {
        Word* const high = tiles[tile % 2][0];
        Word* const low = tiles[tile % 2][1];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float x[PIXELS];
            for (int j = 0; j < PIXELS; ++j) {
                const bool inside = tile * TILE + word * PIXELS + j < pixels;
                x[j] = inside ? to_float(part.value[i][j]) - shift[channel + i] : 0;
                sum[i] += x[j];
            }
            const int at = slot(channel + i, word);
            split(SCALAR(), x, 2, high[at], low[at]);
        }
        __syncthreads();
        if (tile + 1 < end) load<CHANNELS_LAST>(part, map, pixels, (tile + 1) * TILE + word * PIXELS, channel);
        // d = H (H + 2 L)^T, so that its symmetric part is (H + L)(H + L)^T but for the negligible L L^T.
#pragma unroll
        for (int w = t; w < WORDS; w += 8) {
            const Word a[4] = {high[slot(row, w)], high[slot(row + 8, w)], high[slot(row, w + 4)], high[slot(row + 8, w + 4)]};
            for (int s = 0; s < STRIPS; ++s) {
                const Word b[2] = {high[slot(column + 8 * s, w)], high[slot(column + 8 * s, w + 4)]};
                const Word c[2] = {low[slot(column + 8 * s, w)], low[slot(column + 8 * s, w + 4)]};
                mma(SCALAR(), d[s], a, b);
                mma(SCALAR(), d[s], a, c);
            }
        }
    }
    sum_words(sum, scratch, total, channel, word);

    const int all = group > 1 ? blocks + blocks / group : blocks;
    float* const rows = partials + (size_t)blockIdx.y * all * PARTIAL;
    float* const partial = rows + (size_t)block * PARTIAL;
    const float inverse = 1.0f / max(count, 1);
    for (int s = 0; s < STRIPS; ++s)
        for (int i = 0; i < 4; ++i) {
            const int r = row + 8 * (i / 2), c = column - g + 8 * s + 2 * t + i % 2;
            partial[r * C + c] = d[s][i] - total[r] * total[c] * inverse;
        }
    if (thread < C) partial[C * C + thread] = shift[thread] + total[thread] * inverse;
    if (thread == 0) partial[C * C + C] = count;
    if (group > 1) merge_group(rows, group, counters, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS) soca_statistics_nchw(
    const SCALAR* maps, int pixels, int group, float* partials, int* counters) {
    statistics<false>(maps, pixels, group, partials, counters);
}

extern "C" __global__ void __launch_bounds__(THREADS) soca_statistics_nhwc(
    const SCALAR* maps, int pixels, int group, float* partials, int* counters) {
    statistics<true>(maps, pixels, group, partials, counters);
}

// This thread's 4 x 4 part of a b.
__device__ inline void product(const float* a, const float* b, float (&d)[4][4]) {
    const int i = threadIdx.x / (C / 4) * 4, j = threadIdx.x % (C / 4) * 4;
    for (auto& line : d)
        for (float& x : line) x = 0;
    if (i >= C) return;
#pragma unroll 4
    for (int k = 0; k < C; k += 4) {
        float4 left[4];
        for (int r = 0; r < 4; ++r) left[r] = *(const float4*)(a + (i + r) * C + k);
        for (int l = 0; l < 4; ++l) {
            const float4 right = *(const float4*)(b + (k + l) * C + j);
            for (int r = 0; r < 4; ++r) {
                const float x = l == 0 ? left[r].x : l == 1 ? left[r].y : l == 2 ? left[r].z : left[r].w;
                d[r][0] += x * right.x;
                d[r][1] += x * right.y;
                d[r][2] += x * right.z;
                d[r][3] += x * right.w;
            }
        }
    }
}

// m = diagonal * I + scale * d, all threads writing their parts.
__device__ inline void write(float* m, const float (&d)[4][4], float diagonal, float scale) {
    const int i = threadIdx.x / (C / 4) * 4, j = threadIdx.x % (C / 4) * 4;
    if (i >= C) return;
    for (int r = 0; r < 4; ++r)
        for (int c = 0; c < 4; ++c) m[(i + r) * C + j + c] = (i + r == j + c ? diagonal : 0) + scale * d[r][c];
}

// y = m x, or the row sums of m where x is null.
__device__ inline void matrix_vector(const float* m, const float* x, float* y) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < C; row += GATE_THREADS / 32) {
        float sum = 0;
        for (int k = lane; k < C; k += 32) sum += m[row * C + k] * (x ? x[k] : 1);
        sum = warp_sum(sum);
        if (lane == 0) y[row] = sum;
    }
    __syncthreads();
}

// sigma: exactly symmetric and visible to all on return; `spread` takes rows * C floats.
__device__ inline void covariance(const float* rows, int count, float* sigma, float* spread) {
    constexpr int OWN = C * C / GATE_THREADS;
    float sum[OWN];
    const float pixels = merge<GATE_THREADS>(rows, count, spread, sum, nullptr);
    for (int e = 0; e < OWN; ++e) sigma[e * GATE_THREADS + threadIdx.x] = sum[e];
    __syncthreads();
    for (int e = 0; e < OWN; ++e) {
        const int at = e * GATE_THREADS + threadIdx.x;
        sum[e] = (sum[e] + sigma[at % C * C + at / C]) * (0.5f / pixels);
    }
    __syncthreads();
    for (int e = 0; e < OWN; ++e) sigma[e * GATE_THREADS + threadIdx.x] = sum[e];
    __syncthreads();
}

// result = row means of the square root of y, by coupled Newton-Schulz steps; y, z and w are C x C, y is overwritten.
// The last step is applied to the vector of ones, which saves its two products.
__device__ inline void sqrt_row_means(float* y, float* z, float* w, int iterations, float* result) {
    float trace = 0;
    for (int k = threadIdx.x % 32; k < C; k += 32) trace += y[k * C + k];
    trace = max(warp_sum(trace), MIN_TRACE);
    __syncthreads();
    for (int at = threadIdx.x; at < C * C; at += GATE_THREADS) {
        y[at] /= trace;
        z[at] = (at / C == at % C ? 1.5f : 0) - 0.5f * y[at];
    }
    __syncthreads();
    float p[4][4], q[4][4];
    product(y, z, p);
    __syncthreads();
    write(y, p, 0, 1);
    __syncthreads();
    for (int step = 2; step < iterations; ++step) {
        product(z, y, p);
        write(w, p, 1.5f, -0.5f);
        __syncthreads();
        product(y, w, p);
        product(w, z, q);
        __syncthreads();
        write(y, p, 0, 1);
        write(z, q, 0, 1);
        __syncthreads();
    }
    float *v = w, *u = w + C, *x = w + 2 * C;
    matrix_vector(y, nullptr, v);
    matrix_vector(z, v, u);
    matrix_vector(y, u, x);
    const float scale = sqrtf(trace) / C;
    for (int c = threadIdx.x; c < C; c += GATE_THREADS) result[c] = scale * (iterations > 1 ? 1.5f * v[c] - 0.5f * x[c] : v[c]);
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(GATE_THREADS) soca_gate(
    const float* partials, const SCALAR* down, const SCALAR* down_bias, const SCALAR* up, const SCALAR* up_bias,
    int rows, int merged, int iterations, int hidden, SCALAR* gates) {
    alignas(16) __shared__ float space[3 * C * C];
    float *y = space, *z = y + C * C, *w = z + C * C;
    float *row_means = w + 3 * C, *layer = w + 4 * C;
    covariance(partials + ((size_t)blockIdx.x * rows + rows - merged) * PARTIAL, merged, y, z);
    sqrt_row_means(y, z, w, iterations, row_means);
    const int lane = threadIdx.x % 32;
    for (int h = threadIdx.x / 32; h < hidden; h += GATE_THREADS / 32) {
        float sum = 0;
        for (int c = lane; c < C; c += 32) sum += to_float(down[h * C + c]) * row_means[c];
        sum = warp_sum(sum) + to_float(down_bias[h]);
        if (lane == 0) layer[h] = max(sum, 0.0f);
    }
    __syncthreads();
    if (threadIdx.x < C) {
        float sum = to_float(up_bias[threadIdx.x]);
        for (int h = 0; h < hidden; ++h) sum += to_float(up[threadIdx.x * hidden + h]) * layer[h];
        round_to(gates[blockIdx.x * C + threadIdx.x], 1 / (1 + exp2_fast(-LOG2_E * sum)));
    }
}
