// Second-order channel attention in two launches; soca.py states the formulas and the launch shapes.
// Compiled with SCALAR (Half, BFloat or float: the map's type) and CHANNELS (16, 32, 48 or 64) defined; with EXPERIMENTAL there
// are soca_merge and soca_gate_tensor too, which have never run on hardware.

constexpr int C = CHANNELS;
constexpr int THREADS = 4 * C;                    // of soca_statistics: one thread per 8 channels and word of a tile
constexpr int WORDS = 32;                         // words of each channel in a tile
constexpr int PIXELS = 4 / (int)sizeof(SCALAR);   // pixels in a word
constexpr int TILE = WORDS * PIXELS;              // pixels in a tile
constexpr int STRIPS = C / 16;                    // strips of 8 columns of the scatter matrix that one warp accumulates
constexpr int PARTIAL = C * C + C + 4;            // floats of a row of partials: scatter about the mean, mean, number of pixels, padding
constexpr int GATE_THREADS = 256;                 // of soca_gate
constexpr float MIN_TRACE = 1e-10f;               // as in sanrt.model.contract: a constant map must give a gate, not NaN

// A picture's tiles are shared by its blocks as evenly as possible; the product does not fit 32 bits for large pictures.
__device__ inline int tile_count(int pixels) { return (pixels + TILE - 1) / TILE; }
__device__ inline int first_tile(int block, int blocks, int pixels) { return (int)((long long)tile_count(pixels) * block / blocks); }

// Where a tile keeps word w of channel c in shared memory. Words are permuted by channel (an XOR swizzle): stored straight,
// the words that a warp reads of 8 channels at a time would lie in 4 banks, and be read one channel after the other.
__device__ inline int slot(int c, int w) { return c * WORDS + (w ^ (((c ^ c >> 3) & 7) * 4)); }

// A thread's part of a tile: 8 channels of one word.
struct Part { SCALAR value[8][PIXELS]; };

// Read a part from global memory, zeros beyond the picture. Channels-last maps are read 8 channels at a time, others a word at a
// time; where rows of pixels are not whole words, words are not aligned and are read number by number.

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

// Sum over a tile's words what each thread has of its 8 channels; total[c] is written and visible to all threads on return.
// The first barrier lets `scratch` share memory with tiles that other threads may still be reading; rows of WORDS + 1 floats
// start in different banks.
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

// Chan's formula over rows of partials: sum of scatters + sum of n (mean_b - mean)(mean_b - mean)^T, of which each of T threads
// gets every T-th element in `sum`; `mean` is written if it is not null. Returns the number of pixels. `deviations` is shared
// memory of count * C floats. The last row must not be empty: its mean is what means are taken relative to, since a large mean
// common to all rows would cost the deviations their digits.
template <int T> __device__ inline float merge(const float* rows, int count, float* deviations, float (&sum)[C * C / T], float* mean) {
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
            deviations[b * C + thread] = n > 0 ? means[(size_t)b * PARTIAL] - origin : 0;
            offset += n * deviations[b * C + thread];
        }
        offset /= pixels;
        for (int b = 0; b < count; ++b) deviations[b * C + thread] -= offset;
        if (mean) mean[thread] = origin + offset;
    }
    __syncthreads();
    for (float& x : sum) x = 0;
    for (int b = 0; b < count; ++b) {
        const float n = counts[(size_t)b * PARTIAL];
        for (int e = 0; e < C * C / T; ++e) {
            const int at = e * T + thread;
            sum[e] += rows[(size_t)b * PARTIAL + at] + n * deviations[b * C + at / C] * deviations[b * C + at % C];
        }
    }
    return pixels;
}

// The last block of a group to come here merges the group's rows into one, behind the rows of all blocks, so that soca_gate has
// few to read. No block waits for another: a counter says which one is the last.
__device__ inline void merge_group(float* rows, int group, int* counters, float* deviations) {
    __shared__ bool last;
    const int blocks = gridDim.x, index = blockIdx.x / group;
    // Every thread makes its part of the row visible to other blocks before one thread counts the block as done.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counters + blockIdx.y * (blocks / group) + index, 1) == group - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();   // and the counter is read before the other blocks' rows
    float* const merged = rows + (size_t)(blocks + index) * PARTIAL;
    float sum[C * C / THREADS];
    const float pixels = merge<THREADS>(rows + (size_t)index * group * PARTIAL, group, deviations, sum, merged + C * C);
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
    // Values are taken relative to the mean of the block's first tile: large means then cancel before anything is squared.
    if (thread < C) {
        SCALAR mean;
        round_to(mean, total[thread] / max(min(count, TILE), 1));
        shift[thread] = to_float(mean);
    }
    __syncthreads();

    float d[STRIPS][4] = {};
    for (int i = 0; i < 8; ++i) sum[i] = 0;
    // Two buffers in turn: one is filled again only after the next tile's barrier, which no thread passes before it has read what
    // is overwritten, so one barrier per tile is enough. The next part is loaded while this tile is multiplied.
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
        // x = h + l, two numbers of the map's format, as tensor cores multiply no wider ones. d = H (H + 2 L)^T takes two products
        // per tile instead of three: its symmetric part is (H + L)(H + L)^T but for the negligible L L^T.
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

    // Lane 4 g + t of the warp holds elements (g, 2 t), (g, 2 t + 1) of a strip and the same of row g + 8. The scatter about the
    // shift becomes the scatter about the block's mean.
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

// A thread's 4 x 4 part of the C x C product a b, in fp32 (not on tensor cores); with C < 64 some threads have no part.
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

// m = diagonal * I + scale * d, of which each thread writes its part.
__device__ inline void write(float* m, const float (&d)[4][4], float diagonal, float scale) {
    const int i = threadIdx.x / (C / 4) * 4, j = threadIdx.x % (C / 4) * 4;
    if (i >= C) return;
    for (int r = 0; r < 4; ++r)
        for (int c = 0; c < 4; ++c) m[(i + r) * C + j + c] = (i + r == j + c ? diagonal : 0) + scale * d[r][c];
}

// y = m x, or the row sums of m where x is null; a warp per row. y is visible to all threads on return.
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

// The covariance of merged rows into sigma: exactly symmetric (the halves of H (H + 2 L)^T are averaged), and visible to all
// threads on return. `deviations` is shared memory of count * C floats.
__device__ inline void covariance(const float* rows, int count, float* sigma, float* deviations) {
    constexpr int OWN = C * C / GATE_THREADS;
    float sum[OWN];
    const float pixels = merge<GATE_THREADS>(rows, count, deviations, sum, nullptr);
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

// result = row means of the square root of y, by coupled Newton-Schulz steps; y, z and w are C x C, and all are overwritten.
// z is the identity at first, so the first step needs one product instead of three. The last step is applied to the vector of
// ones, as only row sums are wanted: three products of a matrix and a vector instead of three of matrices.
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

// gates = sigmoid(up relu(down row_means + down_bias) + up_bias) of one picture; `layer` is shared memory of `hidden` floats.
__device__ inline void excite(
    const float* row_means, float* layer, const SCALAR* down, const SCALAR* down_bias, const SCALAR* up, const SCALAR* up_bias,
    int hidden, SCALAR* gates) {
    const int lane = threadIdx.x % 32;
    for (int h = threadIdx.x / 32; h < hidden; h += GATE_THREADS / 32) {
        float sum = 0;
        for (int c = lane; c < C; c += 32) sum += to_float(down[h * C + c]) * row_means[c];
        sum = warp_sum(sum) + to_float(down_bias[h]);
        if (lane == 0) layer[h] = sum < 0 ? 0 : sum;   // not max: a NaN must show in the gates
    }
    __syncthreads();
    if (threadIdx.x < C) {
        float sum = to_float(up_bias[threadIdx.x]);
        for (int h = 0; h < hidden; ++h) sum += to_float(up[threadIdx.x * hidden + h]) * layer[h];
        round_to(gates[threadIdx.x], 1 / (1 + exp2_fast(-LOG2_E * sum)));
    }
}

extern "C" __global__ void __launch_bounds__(GATE_THREADS) soca_gate(
    const float* partials, const SCALAR* down, const SCALAR* down_bias, const SCALAR* up, const SCALAR* up_bias,
    int rows, int merged, int iterations, int hidden, SCALAR* gates) {
    alignas(16) __shared__ float space[3 * C * C];
    float *y = space, *z = y + C * C, *w = z + C * C;
    covariance(partials + ((size_t)blockIdx.x * rows + rows - merged) * PARTIAL, merged, y, z);
    sqrt_row_means(y, z, w, iterations, w + 3 * C);
    excite(w + 3 * C, w + 4 * C, down, down_bias, up, up_bias, hidden, gates + blockIdx.x * C);
}

#ifdef EXPERIMENTAL
constexpr int MERGE_THREADS = 256;
constexpr int MERGE_WARPS = MERGE_THREADS / 32;

// Sums over a block's warps of what each lane has; in every thread on return. `parts` is free for another call after a barrier.
template <int N> __device__ inline void sum_warps(float (&x)[N], float (&parts)[N][MERGE_WARPS][32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < N; ++i) parts[i][warp][lane] = x[i];
    __syncthreads();
    for (int i = 0; i < N; ++i) {
        x[i] = 0;
        for (int w = 0; w < MERGE_WARPS; ++w) x[i] += parts[i][w][lane];
    }
}

// Merge a picture's rows of partials into one, by Chan's formula as merge() does. A block has 32 elements of the
// matrix, and each of its warps every eighth row: loads in flight, not arithmetic, are what this takes.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS) soca_merge(const float* partials, int blocks, float* merged) {
    __shared__ float parts[3][MERGE_WARPS][32], products[1][MERGE_WARPS][32];
    const int at = blockIdx.x * 32 + threadIdx.x % 32, r = at / C, c = at % C, warp = threadIdx.x / 32;
    const float* const rows = partials + (size_t)blockIdx.y * blocks * PARTIAL;
    const float* const means = rows + C * C;
    const float origin_r = means[(size_t)(blocks - 1) * PARTIAL + r], origin_c = means[(size_t)(blocks - 1) * PARTIAL + c];
    float sums[3] = {};   // of pixels, of their deviations from the origins
#pragma unroll 4
    for (int b = warp; b < blocks; b += MERGE_WARPS) {
        const float* const mean = means + (size_t)b * PARTIAL;
        const float n = mean[C];
        sums[0] += n;
        sums[1] += n * (mean[r] - origin_r);
        sums[2] += n * (mean[c] - origin_c);
    }
    sum_warps(sums, parts);
    const float pixels = sums[0], offset_r = sums[1] / pixels, offset_c = sums[2] / pixels;
    float product[1] = {};
#pragma unroll 4
    for (int b = warp; b < blocks; b += MERGE_WARPS) {
        const float* const mean = means + (size_t)b * PARTIAL;
        product[0] += rows[(size_t)b * PARTIAL + at] + mean[C] * (mean[r] - origin_r - offset_r) * (mean[c] - origin_c - offset_c);
    }
    sum_warps(product, products);
    if (warp > 0) return;
    merged += (size_t)blockIdx.y * PARTIAL;
    merged[at] = product[0];
    if (at < C) merged[C * C + at] = origin_c + offset_c;
    if (at == 0) merged[C * C + C] = pixels;
}

// A C x C matrix for tensor cores: each number is high + low / LOW, two fp16 numbers, which keeps 22 bits of anything between
// 2^-14 and 65504 and is off by 2^-36 at most below. bf16 pairs would keep 16 bits, TF32 pairs 22 at half the rate.
constexpr float LOW = 2048;
struct Matrix {
    alignas(16) Word high[C * WORDS], low[C * WORDS];   // row c's words at slot(c, w), two columns each

    // Columns 2 w and 2 w + 1 of row r.
    __device__ void set(int r, int w, float first, float second) {
        const float x[2] = {first, second};
        split(Half(), x, LOW, high[slot(r, w)], low[slot(r, w)]);
    }
};

// A warp has 16 rows and half of the columns of a product, lane 4 g + t of it elements (g, 2 t), (g, 2 t + 1) of strips of 8 columns
// and the same of row g + 8. Where C < 64 the last warps have none.
struct Place {
    int row, column, t;
    __device__ Place() : row(16 * (threadIdx.x / 64) + threadIdx.x % 32 / 4), column(8 * STRIPS * (threadIdx.x / 32 % 2)), t(threadIdx.x % 4) {}
    __device__ bool inside() const { return row < C; }
};

// d = a b. All three are symmetric but for rounding, yet reading rows of b for its columns would not do: what is not symmetric of it
// would grow from step to step, and ruin the root from about the twelfth on.
__device__ inline void tensor_product(const Matrix& a, const Matrix& b, float (&d)[STRIPS][4]) {
    const Place at;
    const int lane = threadIdx.x % 32, row = at.row;
    float small[STRIPS][4] = {};
    for (auto& strip : d)
        for (float& x : strip) x = 0;
    if (!at.inside()) return;
#pragma unroll
    for (int w = at.t; w < C / 2; w += 8) {
        const int slots[4] = {slot(row, w), slot(row + 8, w), slot(row, w + 4), slot(row + 8, w + 4)};
        const Word high[4] = {a.high[slots[0]], a.high[slots[1]], a.high[slots[2]], a.high[slots[3]]};
        const Word low[4] = {a.low[slots[0]], a.low[slots[1]], a.low[slots[2]], a.low[slots[3]]};
        for (int s = 0; s < STRIPS; ++s) {
            Word columns[4];   // 16 rows of 8 columns of b, as fragments: high, high, low, low
            load_transposed(columns, (lane < 16 ? b.high : b.low) + slot(2 * (w - at.t) + lane % 16, at.column / 2 + 4 * s));
            const Word right[2] = {columns[0], columns[1]}, right_low[2] = {columns[2], columns[3]};
            mma(Half(), small[s], high, right_low);
            mma(Half(), small[s], low, right);
            mma(Half(), d[s], high, right);
        }
    }
    for (int s = 0; s < STRIPS; ++s)
        for (int i = 0; i < 4; ++i) d[s][i] += small[s][i] / LOW;
}

// m = diagonal I + scale d, of which each thread writes its part.
__device__ inline void tensor_write(Matrix& m, const float (&d)[STRIPS][4], float diagonal, float scale) {
    const Place at;
    if (!at.inside()) return;
    for (int s = 0; s < STRIPS; ++s)
        for (int half = 0; half < 2; ++half) {
            const int r = at.row + 8 * half, w = (at.column + 8 * s) / 2 + at.t;
            const float* const x = d[s] + 2 * half;
            m.set(r, w, (r == 2 * w ? diagonal : 0) + scale * x[0], (r == 2 * w + 1 ? diagonal : 0) + scale * x[1]);
        }
}

// y = m x, or the row sums of m where x is null; a warp per row, a lane per word. y is visible to all threads on return.
__device__ inline void tensor_vector(const Matrix& m, const float* x, float* y) {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < C; row += GATE_THREADS / 32) {
        float sum = 0;
        if (lane < C / 2)
            for (int i = 0; i < 2; ++i) {
                const Half high = {(unsigned short)(m.high[slot(row, lane)] >> 16 * i)}, low = {(unsigned short)(m.low[slot(row, lane)] >> 16 * i)};
                sum += (to_float(high) + to_float(low) / LOW) * (x ? x[2 * lane + i] : 1);
            }
        sum = warp_sum(sum);
        if (lane == 0) y[row] = sum;
    }
    __syncthreads();
}

// As sqrt_row_means, of sigma in the memory of m[0].
__device__ inline void tensor_sqrt_row_means(Matrix (&m)[3], int iterations, float* vectors, float* result) {
    const float* const sigma = (const float*)m;
    Matrix &y = m[0], &z = m[1], &w = m[2];
    const Place at;
    float trace = 0, p[STRIPS][4] = {}, q[STRIPS][4];
    for (int k = threadIdx.x % 32; k < C; k += 32) trace += sigma[k * C + k];
    trace = max(warp_sum(trace), MIN_TRACE);
    if (at.inside())
        for (int s = 0; s < STRIPS; ++s)
            for (int i = 0; i < 4; ++i) p[s][i] = sigma[(at.row + 8 * (i / 2)) * C + at.column + 8 * s + 2 * at.t + i % 2] / trace;
    __syncthreads();
    tensor_write(y, p, 0, 1);
    tensor_write(z, p, 1.5f, -0.5f);
    __syncthreads();
    tensor_product(y, z, p);
    __syncthreads();
    tensor_write(y, p, 0, 1);
    __syncthreads();
    for (int step = 2; step < iterations; ++step) {
        tensor_product(z, y, p);
        tensor_write(w, p, 1.5f, -0.5f);
        __syncthreads();
        tensor_product(y, w, p);
        tensor_product(w, z, q);
        __syncthreads();
        tensor_write(y, p, 0, 1);
        tensor_write(z, q, 0, 1);
        __syncthreads();
    }
    float *v = vectors, *u = v + C, *x = u + C;
    tensor_vector(y, nullptr, v);
    tensor_vector(z, v, u);
    tensor_vector(y, u, x);
    const float scale = sqrtf(trace) / C;
    for (int c = threadIdx.x; c < C; c += GATE_THREADS) result[c] = scale * (iterations > 1 ? 1.5f * v[c] - 0.5f * x[c] : v[c]);
    __syncthreads();
}

// soca_gate with the root on tensor cores, for at most 24 steps: z can grow by 1.5 a step, and fp16 ends at 65504.
extern "C" __global__ void __launch_bounds__(GATE_THREADS) soca_gate_tensor(
    const float* partials, const SCALAR* down, const SCALAR* down_bias, const SCALAR* up, const SCALAR* up_bias,
    int rows, int merged, int iterations, int hidden, SCALAR* gates) {
    alignas(16) __shared__ Matrix m[3];
    float* const vectors = (float*)(m + 2);   // w is read for the last time before they are written
    covariance(partials + ((size_t)blockIdx.x * rows + rows - merged) * PARTIAL, merged, (float*)m, (float*)(m + 1));
    tensor_sqrt_row_means(m, iterations, vectors, vectors + 3 * C);
    excite(vectors + 3 * C, vectors + 4 * C, down, down_bias, up, up_bias, hidden, gates + blockIdx.x * C);
}
#endif
