import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from sanrt.errors import BackendError
from sanrt.kernels.cuda import nvrtc
from sanrt.kernels.cuda.nvrtc import ARCHITECTURES, CudaSource

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc: pip install 'sanrt[kernels]'")

SOCA = {scalar: CudaSource("soca", (f"SCALAR={scalar}", "CHANNELS=64")) for scalar in ("Half", "BFloat", "float")}
ATTENTION = {
    scalar: CudaSource("region_attention", (f"SCALAR={scalar}", "INNER=8")) for scalar in ("Half", "BFloat", "float")
}
RESIDUAL = {scalar: CudaSource("residual", (f"SCALAR={scalar}", "CHANNELS=64")) for scalar in ("Half", "BFloat", "float")}
EXPERIMENTAL = [
    CudaSource(source.name, (*source.defines, "EXPERIMENTAL"))
    for source in (*SOCA.values(), ATTENTION["Half"], ATTENTION["BFloat"])
]
SMALLER = [
    *(CudaSource("soca", ("SCALAR=Half", f"CHANNELS={c}")) for c in (16, 32, 48)),
    *(CudaSource("region_attention", ("SCALAR=Half", f"INNER={i}")) for i in (4, 6)),
]
OTHERS = [source for kind in (SOCA, ATTENTION, RESIDUAL) for scalar, source in kind.items() if scalar != "Half"]
COMPILED = [
    *((kind["Half"], capability) for kind in (SOCA, ATTENTION, RESIDUAL) for capability in ARCHITECTURES),
    *((source, 90) for source in (*OTHERS, *EXPERIMENTAL, *SMALLER)),
    *((source, (80, 86, 89, 100, 120)[number % 5]) for number, source in enumerate((*OTHERS, *EXPERIMENTAL, *SMALLER))),
]
"""fp16 for every architecture; the others for Hopper and, in turns, for one more: all of them took three minutes."""
KERNELS = {
    "soca": {"soca_statistics_nchw", "soca_statistics_nhwc", "soca_gate"},
    "region_attention": {"region_pool", "region_attention"},
    "residual": {"residual"},
}
EXPERIMENTAL_KERNELS = {"soca": {"soca_merge", "soca_gate_tensor"}, "region_attention": {"region_attention_ahead"}}
THREADS = {
    "soca_merge": 256,
    "soca_gate_tensor": 256,
    "region_attention_ahead": 256,
    "soca_gate": 256,
    "soca_statistics_nchw": 256,
    "soca_statistics_nhwc": 256,
    "region_pool": 256,
    "region_attention": 256,
    "residual": 256,
}


def check(source: CudaSource, capability: int, spill_bytes: int = 0) -> None:
    code, reports = source.compile(f"sm_{capability}")
    assert code.startswith(b"\x7fELF")
    experimental = EXPERIMENTAL_KERNELS[source.name] if "EXPERIMENTAL" in source.defines else set()
    assert reports.keys() == KERNELS[source.name] | experimental
    for kernel, report in reports.items():
        assert report.spill_bytes <= spill_bytes, kernel
        assert report.registers * THREADS[kernel] <= 65536, kernel
        assert report.shared_bytes <= 48 * 1024, kernel


@pytest.mark.parametrize(("source", "capability"), [(SOCA["Half"], 90), (ATTENTION["Half"], 80), (ATTENTION["float"], 120)])
def test_the_main_kernels_compile_without_spills(source: CudaSource, capability: int) -> None:
    check(source, capability)


@pytest.mark.parametrize("source", [EXPERIMENTAL[0], EXPERIMENTAL[-1]], ids=lambda source: source.name)
def test_what_is_experimental_compiles_for_hopper_without_spills_and_two_blocks_fit(source: CudaSource) -> None:
    """A multiprocessor of sm_90 has 65,536 registers and 227 KB of shared memory."""
    _, reports = source.compile("sm_90a")
    for kernel in EXPERIMENTAL_KERNELS[source.name]:
        at_once = 1 if kernel == "soca_gate_tensor" else 2  # of which a picture has one block
        assert reports[kernel].spill_bytes == 0
        assert at_once * THREADS[kernel] * reports[kernel].registers <= 65536
        assert at_once * reports[kernel].shared_bytes <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "capability"),
    COMPILED,
    ids=lambda value: " ".join((value.name, *value.defines)) if isinstance(value, CudaSource) else str(value),
)
def test_kernels_compile_for_every_architecture_all_but_without_spills(source: CudaSource, capability: int) -> None:
    # soca_gate with 32 channels spills 24 bytes on sm_80, 86 and 89, where the compiler stops at 64 registers.
    check(source, capability, spill_bytes=24 if source in SMALLER else 0)


def test_half_precision_products_are_on_tensor_cores() -> None:
    ptx = ATTENTION["Half"].compile("compute_80")[0].decode()
    for products in ("m16n8k8", "m16n8k16"):
        assert f"mma.sync.aligned.{products}.row.col.f32.f16.f16.f32" in ptx
    assert ".target sm_80" in ptx


def test_a_kernel_is_compiled_once_and_found_by_its_digest_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        nvrtc, "run_nvrtc", lambda name, source, options, kind: (calls.append(options), (kind.encode(), ""))[1]
    )
    source = ATTENTION["Half"]
    assert source.cubin(80) == b"CUBIN"
    assert source.cubin(80) == b"CUBIN"
    assert source.ptx(80) == b"PTX"
    assert source.cubin(90) == b"CUBIN"
    assert CudaSource("region_attention", ("SCALAR=Half", "INNER=6")).cubin(80) == b"CUBIN"
    assert len(calls) == 4
    files = sorted(path.suffix for path in (tmp_path / "sanrt" / "kernels").iterdir())
    assert files == [".cubin", ".cubin", ".cubin", ".ptx"]


def test_a_source_that_does_not_compile_is_told_with_the_compilers_complaint() -> None:
    with pytest.raises(
        BackendError, match=r'soca\.cu does not compile with .*SCALAR=Quarter.*identifier "Quarter" is undefined'
    ):
        CudaSource("soca", ("SCALAR=Quarter", "CHANNELS=64")).compile("sm_80")


def test_the_compilers_report_is_read_kernel_by_kernel() -> None:
    log = """ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 75 registers, used 1 barriers, 49152 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers"""
    assert nvrtc.parse_ptxas_report(log) == {"one": nvrtc.KernelReport(75, 20, 49152), "two": nvrtc.KernelReport(8, 0, 0)}


def test_a_library_that_is_not_found_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def nvrtcVersion() -> None:
            raise RuntimeError("libnvrtc.so.13: not found\nsearched: /usr/lib\n")

    monkeypatch.setattr(nvrtc, "import_nvrtc", lambda: Missing)
    with pytest.raises(BackendError, match=r"not found\); pip install") as error:
        nvrtc.nvrtc_version()
    assert "\n" not in str(error.value)


def test_ptx_is_text_of_a_version_that_older_drivers_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC 13.5 writes `.version 9.5` and a NUL byte, which the drivers of CUDA 13.0 refuse."""
    made = b"//\n.version 9.5\n.target sm_80\n.entry soca() { .version 9.5 }\n\0"
    monkeypatch.setattr(CudaSource, "cached", lambda self, architecture, kind: made)
    assert CudaSource("soca", ()).ptx(80) == b"//\n.version 8.3\n.target sm_80\n.entry soca() { .version 9.5 }\n"


@pytest.mark.parametrize(
    ("scalar", "capability"), [*(("Half", capability) for capability in ARCHITECTURES), ("BFloat", 90), ("float", 80)]
)
def test_the_assembler_takes_that_version_of_the_plugins_kernels_for_every_gpu(
    scalar: str, capability: int, tmp_path: Path
) -> None:
    ptxas = shutil.which("ptxas") or next(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/ptxas"), None)
    if ptxas is None:
        pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc")
    (tmp_path / "kernel.ptx").write_bytes(SOCA[scalar].ptx(80))
    command = [ptxas, f"-arch=sm_{capability}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
