// The C interface of the emulated kernels of region_attention.cu.
extern "C" void emulate_region_attention(const SCALAR* maps, int batch, int height, int width, int regions, int padded, int channels_last,
                                         unsigned blocks, unsigned seed, SCALAR* keys, SCALAR* values, SCALAR* y) {
    const unsigned cells = regions * regions, pictures = batch;
    emulation::launch({(padded * DEPTH + THREADS - 1u) / THREADS, cells, pictures}, THREADS, seed,
                      [&] { region_pool(maps, height, width, regions, padded, channels_last, keys, values); });
    emulation::launch({blocks, cells, pictures}, THREADS, seed,
                      [&] { region_attention(maps, keys, values, height, width, regions, padded, channels_last, y); });
}
