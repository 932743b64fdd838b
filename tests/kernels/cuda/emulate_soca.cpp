// The C interface of the emulated kernels of soca.cu; soca_merge is launched where `merging` blocks have a part of it.
extern "C" void emulate_soca(
    const SCALAR* maps, const SCALAR* down, const SCALAR* down_bias, const SCALAR* up, const SCALAR* up_bias, int batch, int pixels,
    int channels_last, int blocks, int group, int merging, int tensor, int rows, int merged, int iterations, int hidden, unsigned seed,
    float* partials, float* row, int* counters, SCALAR* gates) {
    emulation::launch({(unsigned)blocks, (unsigned)batch, 1}, THREADS, seed,
                      [&] { (channels_last ? soca_statistics_nhwc : soca_statistics_nchw)(maps, pixels, group, partials, counters); });
    if (merging) emulation::launch({(unsigned)merging, (unsigned)batch, 1}, MERGE_THREADS, seed, [&] { soca_merge(partials, blocks, row); });
    emulation::launch({(unsigned)batch, 1, 1}, GATE_THREADS, seed, [&] {
        (tensor ? soca_gate_tensor : soca_gate)(merging ? row : partials, down, down_bias, up, up_bias, rows, merged, iterations, hidden, gates);
    });
}
