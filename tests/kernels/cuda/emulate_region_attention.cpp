// The C interface of the emulated kernels of region_attention.cu; what is experimental there is for 16-bit types.
extern "C" void emulate_region_attention(const SCALAR* maps, int batch, int height, int width, int regions, int padded, int channels_last,
                                         unsigned blocks, int ahead, unsigned seed, SCALAR* keys, SCALAR* values, SCALAR* y) {
    const unsigned cells = regions * regions, pictures = batch;
    emulation::launch({(padded * DEPTH + THREADS - 1u) / THREADS, cells, pictures}, THREADS, seed,
                      [&] { region_pool(maps, height, width, regions, padded, channels_last, keys, values); });
#ifdef EXPERIMENTAL
    const auto attend = ahead ? region_attention_ahead : region_attention;
#else
    const auto attend = region_attention;
#endif
    emulation::launch({blocks, cells, pictures}, THREADS, seed,
                      [&] { attend(maps, keys, values, height, width, regions, padded, channels_last, y); });
}
