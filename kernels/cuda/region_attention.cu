// Region-level non-local attention in two launches; region_attention.py states the formula and the launch shapes.
// Compiled with SCALAR (Half, BFloat or float) and INNER (inner channels, 1 to 8) defined. Maps are B x 3 INNER x H x W
// (queries, keys, values), NCHW or NHWC; inner channels are padded to 8 with zeros. With EXPERIMENTAL, of 16-bit types, there is
// region_attention_ahead too, which has never run on hardware.

constexpr int DEPTH = 8;                              // inner channels, padded
constexpr int TILE_KEYS = 128;                        // keys in shared memory at a time; a region's are padded to whole tiles
constexpr int STEP_KEYS = 64;                         // keys between two updates of the running maximum
constexpr int THREADS = 256;
constexpr int BLOCK_QUERIES = THREADS / 2;            // queries of a block: 16 for each warp
constexpr int PER_WORD = 4 / (int)sizeof(SCALAR);     // numbers in a word
constexpr int VALUE_ROW = TILE_KEYS / PER_WORD + 4 * (3 - PER_WORD);   // words from one channel's values to the next's; the padding
                                                                       // keeps a fragment's loads out of each other's banks
constexpr bool IS_FP32 = sizeof(SCALAR) == 4;         // then every product is three tf32 products
constexpr int MIN_BLOCKS_PER_SM = IS_FP32 ? 2 : 3;    // on a multiprocessor: tells the compiler how many registers there are, so
                                                      // that it spills none

struct Region { int top, left, height, width; };

// Regions are cut at floor(i * size / k), as in the reference, and so differ in size by at most one.
__device__ inline Region region_of(int index, int regions, int height, int width) {
    const int i = index / regions, j = index % regions;
    const int top = height * i / regions, left = width * j / regions;
    return {top, left, height * (i + 1) / regions - top, width * (j + 1) / regions - left};
}

// Index of an element of a map in either layout; 64 bits, as maps of large pictures have more than 2^31 elements.
__device__ inline size_t offset(int batch, int channel, int y, int x, int channels, int height, int width, int channels_last) {
    const size_t pixel = (size_t)y * width + x, size = (size_t)height * width;
    return channels_last ? (batch * size + pixel) * channels + channel : (batch * (size_t)channels + channel) * size + pixel;
}

// Max-pool keys and values 2 x 2 into keys [B, regions^2, padded, 8] and values [B, regions^2, 8, padded], zeros beyond a region's
// own: the layouts in which region_attention reads words of the two factors of its products. One thread per key and channel.
extern "C" __global__ void __launch_bounds__(THREADS) region_pool(
    const SCALAR* maps, int height, int width, int regions, int padded, int channels_last, SCALAR* keys, SCALAR* values) {
    const int key = (blockIdx.x * THREADS + threadIdx.x) / DEPTH, channel = threadIdx.x % DEPTH;
    if (key >= padded) return;
    const Region region = region_of(blockIdx.y, regions, height, width);
    const int columns = region.width / 2, y = region.top + key / columns * 2, x = region.left + key % columns * 2;
    const size_t slice = ((size_t)blockIdx.z * regions * regions + blockIdx.y) * padded * DEPTH;
    SCALAR largest[2] = {};
    if (channel < INNER && key < region.height / 2 * columns)
        for (int part = 0; part < 2; ++part) {
            const SCALAR* const first = maps + offset(blockIdx.z, (part + 1) * INNER + channel, y, x, 3 * INNER, height, width, channels_last);
            const size_t right = channels_last ? 3 * INNER : 1, below = right * width;
            for (int k = 0; k < 4; ++k) {
                const SCALAR value = first[k / 2 * below + k % 2 * right];
                // Negated, so that the comparison with a NaN takes it, and it shows in the result.
                if (k == 0 || !(to_float(value) <= to_float(largest[part]))) largest[part] = value;
            }
        }
    keys[slice + key * DEPTH + channel] = largest[0];
    values[slice + (size_t)channel * padded + key] = largest[1];
}

// A tile of keys and values in shared memory. fp32 numbers are kept as the sum of two tf32, split once for all warps.
struct Tile {
    static constexpr int KEY_ROW = IS_FP32 ? DEPTH + 4 : DEPTH / 2;   // words
    Word keys[IS_FP32 ? 2 : 1][TILE_KEYS * KEY_ROW];
    Word values[IS_FP32 ? 2 : 1][DEPTH * VALUE_ROW];

    __device__ void fill(const SCALAR* all_keys, const SCALAR* all_values, int first, int padded) {
        constexpr int ROW = DEPTH / PER_WORD, LINE = TILE_KEYS / PER_WORD;
        const Word* const k = (const Word*)(all_keys + (size_t)first * DEPTH);
        for (int i = threadIdx.x; i < TILE_KEYS * ROW; i += THREADS) put(keys, i / ROW * KEY_ROW + i % ROW, k[i]);
        for (int i = threadIdx.x; i < DEPTH * LINE; i += THREADS)
            put(values, i / LINE * VALUE_ROW + i % LINE, ((const Word*)(all_values + (size_t)(i / LINE) * padded + first))[i % LINE]);
    }

    template <int PARTS, int SIZE> __device__ static void put(Word (&to)[PARTS][SIZE], int at, Word word) {
        if constexpr (IS_FP32) {
            const float x[1] = {__uint_as_float(word)};
            split(float(), x, 1, to[0][at], to[PARTS - 1][at]);
        } else {
            to[0][at] = word;
        }
    }
};

// The 16 queries of a warp, in registers, as the left factor of a product: lane 4 g + t holds parts of rows g and g + 8.
template <typename T> struct Queries {
    Word high[4], low[4];

    // x: channels (2 t, 2 t + 1) of row g and of row g + 8 for 16-bit types; channels (t, t + 4) of both rows for fp32.
    __device__ explicit Queries(const float (&x)[2][2]) {
        if constexpr (IS_FP32) {
            for (int i = 0; i < 4; ++i) {
                const float one[1] = {x[i % 2][i / 2]};
                split(float(), one, 1, high[i], low[i]);
            }
        } else {
            for (int i = 0; i < 2; ++i) high[i] = pack(T(), x[i][0], x[i][1]);
        }
    }

    // Scores of 8 keys from `key` on: rows g and g + 8, keys (2 t, 2 t + 1).
    __device__ void scores(const Tile& tile, int key, float (&s)[4]) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, at = (key + g) * Tile::KEY_ROW + t;
        for (float& x : s) x = 0;
        if constexpr (IS_FP32) {
            const Word h[2] = {tile.keys[0][at], tile.keys[0][at + 4]}, l[2] = {tile.keys[1][at], tile.keys[1][at + 4]};
            // Small products first: added to the large one they would lose digits.
            mma(float(), s, high, l);
            mma(float(), s, low, h);
            mma(float(), s, high, h);
        } else {
            const Word a[2] = {high[0], high[1]};
            mma_short(T(), s, a, tile.keys[0][at]);
        }
    }
};

// y += p v for 16 keys from `key` on; p is laid out as scores are, y has rows g and g + 8, channels (2 t, 2 t + 1).
template <typename T> __device__ inline void accumulate(T, const Tile& tile, int key, const float (&p)[2][4], float (&y)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if constexpr (IS_FP32) {
        for (int half = 0; half < 2; ++half) {
            // The order of the keys is free in a sum: columns (t, t + 4) of the left factor stand for keys (2 t, 2 t + 1).
            const int at = g * VALUE_ROW + key + 8 * half + 2 * t;
            const Word vh[2] = {tile.values[0][at], tile.values[0][at + 1]}, vl[2] = {tile.values[1][at], tile.values[1][at + 1]};
            Word ph[4], pl[4];
            for (int i = 0; i < 4; ++i) {
                const float one[1] = {p[half][i % 2 * 2 + i / 2]};
                split(float(), one, 1, ph[i], pl[i]);
            }
            mma(float(), y, ph, vl);
            mma(float(), y, pl, vh);
            mma(float(), y, ph, vh);
        }
    } else {
        const int at = g * VALUE_ROW + key / 2 + t;
        const Word v[2] = {tile.values[0][at], tile.values[0][at + 4]};
        Word a[4];
        for (int i = 0; i < 4; ++i) a[i] = pack(T(), p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
        mma(T(), y, a, v);
    }
}

// Running (online) softmax of a lane's two rows, g and g + 8: largest score so far, sum of this lane's exponentials, weighted
// values. `largest` is the same in the four lanes that share a row; `sum` is added up across them at the end only.
struct Softmax {
    float largest[2] = {LOWEST, LOWEST}, sum[2] = {}, y[4] = {};

    // s: scores of STEP_KEYS keys in units of log 2, LOWEST where there is no key; turned into exponentials.
    __device__ void step(const Tile& tile, int first, float (&s)[STEP_KEYS / 8][4]) {
        for (int row = 0; row < 2; ++row) {
            float top = largest[row];
            for (auto& part : s) top = max(top, max(part[2 * row], part[2 * row + 1]));
            top = max(top, lane_xor(top, 1));
            top = max(top, lane_xor(top, 2));
            const float rescale = exp2_fast(largest[row] - top);
            largest[row] = top;
            sum[row] *= rescale;
            for (int i = 2 * row; i < 2 * row + 2; ++i) {
                y[i] *= rescale;
                for (auto& part : s) sum[row] += part[i] = exp2_fast(part[i] - top);
            }
        }
        // Tensor cores truncate what they add up, always towards zero: an error that grows with the number of keys and that fp32
        // would show. So only one step's sum is left to them, and steps are added up with rounding.
        float part[4] = {};
        float (&products)[4] = IS_FP32 ? part : y;
#pragma unroll
        for (int i = 0; i < STEP_KEYS / 8; i += 2) {
            const float p[2][4] = {{s[i][0], s[i][1], s[i][2], s[i][3]}, {s[i + 1][0], s[i + 1][1], s[i + 1][2], s[i + 1][3]}};
            accumulate(SCALAR(), tile, first + 8 * i, p, products);
        }
        if (IS_FP32)
            for (int i = 0; i < 4; ++i) y[i] += part[i];
    }

    // Divides by the sums over the four lanes that share a row.
    __device__ void finish() {
        for (int row = 0; row < 2; ++row) {
            sum[row] += lane_xor(sum[row], 1);
            sum[row] += lane_xor(sum[row], 2);
            y[2 * row] /= sum[row];
            y[2 * row + 1] /= sum[row];
        }
    }
};

// y: B x INNER x H x W in the maps' layout. One block takes BLOCK_QUERIES queries of one region to all its keys. The grid is that of
// the largest region; blocks beyond a smaller one have nothing to do.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS_PER_SM) region_attention(
    const SCALAR* maps, const SCALAR* keys, const SCALAR* values,
    int height, int width, int regions, int padded, int channels_last, SCALAR* y) {
    alignas(16) __shared__ Tile tile;
    const Region region = region_of(blockIdx.y, regions, height, width);
    const int queries = region.height * region.width, count = (region.height / 2) * (region.width / 2);
    if (blockIdx.x * BLOCK_QUERIES >= queries) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first_query = blockIdx.x * BLOCK_QUERIES + threadIdx.x / 32 * 16 + g;

    float x[2][2];
    for (int row = 0; row < 2; ++row)
        for (int i = 0; i < 2; ++i) {
            const int channel = IS_FP32 ? t + 4 * i : 2 * t + i, query = first_query + 8 * row;
            const bool inside = channel < INNER && query < queries;
            x[row][i] = inside ? to_float(maps[offset(blockIdx.z, channel, region.top + query / region.width, region.left + query % region.width,
                                                      3 * INNER, height, width, channels_last)]) : 0;
        }
    const Queries<SCALAR> q(x);
    Softmax softmax;
    const size_t slice = ((size_t)blockIdx.z * regions * regions + blockIdx.y) * padded * DEPTH;
    for (int start = 0; start < count; start += TILE_KEYS) {
        __syncthreads();   // nobody still reads the tile before
        tile.fill(keys + slice, values + slice, start, padded);
        __syncthreads();
        for (int first = 0; first < TILE_KEYS && start + first < count; first += STEP_KEYS) {
            float s[STEP_KEYS / 8][4];
            for (int i = 0; i < STEP_KEYS / 8; ++i) {
                q.scores(tile, first + 8 * i, s[i]);
                for (int j = 0; j < 4; ++j) s[i][j] *= LOG2_E;
            }
            // Padded keys are zeros, whose score 0 would have weight; only the last step has any.
            if (start + first + STEP_KEYS > count)
                for (int i = 0; i < STEP_KEYS / 8; ++i)
                    for (int j = 0; j < 4; ++j)
                        if (start + first + 8 * i + 2 * t + j % 2 >= count) s[i][j] = LOWEST;
            softmax.step(tile, first, s);
        }
    }
    softmax.finish();
    for (int row = 0; row < 2; ++row)
        for (int i = 0; i < 2; ++i) {
            const int channel = 2 * t + i, query = first_query + 8 * row;
            if (channel < INNER && query < queries)
                round_to(y[offset(blockIdx.z, channel, region.top + query / region.width, region.left + query % region.width,
                                  INNER, height, width, channels_last)], softmax.y[2 * row + i]);
        }
}

#ifdef EXPERIMENTAL
constexpr int WARP_TILES = 2;                         // of 16 queries for each warp: keys and values are read once for both
constexpr int AHEAD_QUERIES = BLOCK_QUERIES * WARP_TILES;
constexpr int AHEAD_STEP = 32;                        // keys between two looks at the running maximum
constexpr float SLACK = 8;                            // scores may exceed their reference by this, in units of log 2: weights up to
                                                      // 2^8 are far from fp16's 65504, and the reference hardly ever moves

constexpr float LN_2 = 0.69314718056f;

// Softmax of a lane's two rows of 16 queries relative to a reference that follows the largest score no closer than SLACK. Sums are
// products with a vector of ones: of the rounded weights, as the numerators are, and added up by tensor cores.
struct LazySoftmax {
    float reference[2] = {LOWEST, LOWEST}, limit[2] = {LOWEST, LOWEST}, sum[4] = {}, y[4] = {};

    // s: scores of AHEAD_STEP keys, LOWEST where there is no key; true where a row's exceed its limit.
    __device__ bool exceeded(const float (&s)[AHEAD_STEP / 8][4], float (&top)[2]) const {
        for (int row = 0; row < 2; ++row) {
            top[row] = s[0][2 * row];
            for (auto& part : s) top[row] = max(top[row], max(part[2 * row], part[2 * row + 1]));
        }
        return top[0] > limit[0] || top[1] > limit[1];
    }

    // Move the reference up to the largest score of the four lanes that share a row.
    __device__ void raise(const float (&top)[2]) {
        for (int row = 0; row < 2; ++row) {
            float highest = max(top[row], lane_xor(top[row], 1));
            highest = max(highest, lane_xor(highest, 2));
            const float moved = max(reference[row], LOG2_E * highest), rescale = exp2_fast(reference[row] - moved);
            reference[row] = moved;
            limit[row] = (moved + SLACK) * LN_2;
            for (int i = 2 * row; i < 2 * row + 2; ++i) {
                sum[i] *= rescale;
                y[i] *= rescale;
            }
        }
    }

    // Add the 16 keys of two columns of scores, whose values are v.
    __device__ void add(const float (&left)[4], const float (&right)[4], const Word (&v)[2]) {
        const Word one = round_pair(SCALAR(), 1, 1), ones[2] = {one, one};
        Word p[4];
        for (int i = 0; i < 4; ++i) {
            const float* const pair = (i < 2 ? left : right) + i % 2 * 2;
            p[i] = round_pair(SCALAR(), exp2_fast(LOG2_E * pair[0] - reference[i % 2]), exp2_fast(LOG2_E * pair[1] - reference[i % 2]));
        }
        mma(SCALAR(), y, p, v);
        mma(SCALAR(), sum, p, ones);
    }
};

// Two tiles of keys and values: one is filled while the other is read.
struct Buffers {
    alignas(16) Word keys[2][TILE_KEYS * DEPTH / 2];
    alignas(16) Word values[2][DEPTH * VALUE_ROW];

    // A thread copies 16 bytes: one key, or 8 keys' values of a channel.
    __device__ void fill(int buffer, const SCALAR* all_keys, const SCALAR* all_values, int first, int padded) {
        constexpr int LINE = TILE_KEYS / 8;
        const int i = threadIdx.x % TILE_KEYS;
        if (threadIdx.x < TILE_KEYS) copy_async(keys[buffer] + i * 4, all_keys + (size_t)(first + i) * DEPTH);
        else copy_async(values[buffer] + i / LINE * VALUE_ROW + i % LINE * 4, all_values + (size_t)(i / LINE) * padded + first + i % LINE * 8);
    }
};

// AHEAD_STEP keys from `first` on, of a tile that has `count`. Padded keys are zeros, whose score 0 would have weight; only the
// LAST step has any, and tests for them stay out of the others.
template <bool LAST>
__device__ inline void step(
    const Buffers& tiles, int buffer, int first, int count, const Word (&q)[WARP_TILES][2], LazySoftmax (&softmax)[WARP_TILES]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float s[WARP_TILES][AHEAD_STEP / 8][4], top[WARP_TILES][2];
    for (int i = 0; i < AHEAD_STEP / 8; ++i) {
        const Word key = tiles.keys[buffer][(first + 8 * i + g) * 4 + t];
        for (int tile = 0; tile < WARP_TILES; ++tile) {
            product_short(SCALAR(), s[tile][i], q[tile], key);
            for (int j = 0; j < 4; ++j)
                if (LAST && first + 8 * i + 2 * t + j % 2 >= count) s[tile][i][j] = LOWEST;
        }
    }
    bool exceeded = false;
    for (int tile = 0; tile < WARP_TILES; ++tile) exceeded |= softmax[tile].exceeded(s[tile], top[tile]);
    if (warp_any(exceeded))
        for (int tile = 0; tile < WARP_TILES; ++tile) softmax[tile].raise(top[tile]);
    for (int i = 0; i < AHEAD_STEP / 8; i += 2) {
        const int at = g * VALUE_ROW + (first + 8 * i) / 2 + t;
        const Word v[2] = {tiles.values[buffer][at], tiles.values[buffer][at + 4]};
        for (int tile = 0; tile < WARP_TILES; ++tile) softmax[tile].add(s[tile][i], s[tile][i + 1], v);
    }
}

// As region_attention, for 16-bit types, with AHEAD_QUERIES queries to a block. For each score it spends one instruction on the maximum,
// one on the exponent's argument and the exponential itself; a tile takes one barrier, which finds it loaded.
extern "C" __global__ void __launch_bounds__(THREADS, 2) region_attention_ahead(
    const SCALAR* maps, const SCALAR* keys, const SCALAR* values,
    int height, int width, int regions, int padded, int channels_last, SCALAR* y) {
    __shared__ Buffers tiles;
    const Region region = region_of(blockIdx.y, regions, height, width);
    const int queries = region.height * region.width, count = (region.height / 2) * (region.width / 2);
    if (blockIdx.x * AHEAD_QUERIES >= queries) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_query = blockIdx.x * AHEAD_QUERIES + threadIdx.x / 32 * 16 * WARP_TILES + g;

    Word q[WARP_TILES][2];
    for (int row = 0; row < 2 * WARP_TILES; ++row) {
        float x[2];
        for (int i = 0; i < 2; ++i) {
            const int channel = 2 * t + i, query = first_query + 8 * row;
            const bool inside = channel < INNER && query < queries;
            x[i] = inside ? to_float(maps[offset(blockIdx.z, channel, region.top + query / region.width, region.left + query % region.width,
                                                 3 * INNER, height, width, channels_last)]) : 0;
        }
        q[row / 2][row % 2] = round_pair(SCALAR(), x[0], x[1]);
    }
    LazySoftmax softmax[WARP_TILES];
    const size_t slice = ((size_t)blockIdx.z * regions * regions + blockIdx.y) * padded * DEPTH;
    tiles.fill(0, keys + slice, values + slice, 0, padded);
    for (int start = 0, buffer = 0; start < count; start += TILE_KEYS, buffer ^= 1) {
        await_copies();
        __syncthreads();   // this tile is there, and nobody still reads the other buffer
        if (start + TILE_KEYS < count) tiles.fill(buffer ^ 1, keys + slice, values + slice, start + TILE_KEYS, padded);
        const int here = min(count - start, TILE_KEYS);
        int first = 0;
#pragma unroll 1
        for (; first + AHEAD_STEP <= here; first += AHEAD_STEP) step<false>(tiles, buffer, first, here, q, softmax);
        if (first < here) step<true>(tiles, buffer, first, here, q, softmax);
    }
    for (int row = 0; row < 2 * WARP_TILES; ++row)
        for (int i = 0; i < 2; ++i) {
            const int channel = 2 * t + i, query = first_query + 8 * row;
            const LazySoftmax& own = softmax[row / 2];
            if (channel < INNER && query < queries)
                round_to(y[offset(blockIdx.z, channel, region.top + query / region.width, region.left + query % region.width,
                                  INNER, height, width, channels_last)], own.y[row % 2 * 2 + i] / own.sum[row % 2 * 2 + i]);
        }
}
#endif
