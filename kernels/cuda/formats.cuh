// Arithmetic on words that needs no particular hardware.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.402823466e38f;

template <typename T> __device__ inline Word pack(T, float low, float high) {
    T a, b;
    round_to(a, low);
    round_to(b, high);
    return (Word)a.bits | (Word)b.bits << 16;
}

// Split x into high + low, to twice the format's precision, a word of each. `low` comes multiplied by `scale`: SOCA wants 2 L.
template <typename T> __device__ inline void split(T, const float (&x)[2], float scale, Word& high, Word& low) {
    T a, b;
    round_to(a, x[0]);
    round_to(b, x[1]);
    high = (Word)a.bits | (Word)b.bits << 16;
    low = pack(T(), scale * (x[0] - to_float(a)), scale * (x[1] - to_float(b)));
}
__device__ inline void split(float, const float (&x)[1], float scale, Word& high, Word& low) {
    high = round_tf32(x[0]);
    low = round_tf32(scale * (x[0] - __uint_as_float(high)));
}

// The sum over a warp's 32 lanes, in every lane.
__device__ inline float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += lane_xor(x, mask);
    return x;
}
