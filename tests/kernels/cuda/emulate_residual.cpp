// The C interface of the emulated kernel of residual.cu.
extern "C" void emulate_residual(const Vector* y, const SCALAR* bias, const Vector* x, int vectors, Vector* sum) {
    emulation::launch({(vectors + THREADS - 1u) / THREADS, 1, 1}, THREADS, 0, [&] { residual(y, bias, x, vectors, sum); });
}
